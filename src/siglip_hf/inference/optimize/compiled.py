"""Encoder blocks for inference on a GPU: queries, keys and values in one product, and the steps between products fused.

The block is one function of its weights, so that torch.compile makes it once for all blocks of a tower, with the batch
as a variable: one compilation serves every batch above 1, and one more a batch of 1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from siglip_hf.inference.optimize.packed import PackedBlock, PackedLinear


class FusedLinear(PackedLinear):
    """The weights of a linear layer, or of several with the same input, as one plain tensor on their device."""

    fused = None

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype, activation: str | None = None):
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out)."""
        return F.linear(states, self.weight, self.bias)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The weight (out, in) and the bias (out,)."""
        return self.weight, self.bias

    def add_to(self, residual: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out) and adds it to `residual` (..., out)."""
        return residual + self(states)


class FusedBlock(PackedBlock):
    """A block with one product for queries, keys and values; torch's own kernels."""

    linear = FusedLinear
    kind = "with one product for queries, keys and values"

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, last_token_only: bool = False
    ) -> torch.Tensor:
        """Maps (B, S, D) to (B, S, D), or to (B, 1, D), the last position, with `last_token_only`."""
        return self._forward(hidden_states, attention_mask, last_token_only)

    def _attend(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, S, 3 D) queries, keys and values -> (B, S, D)."""
        return _attend(qkv, mask, self.num_heads, self.scale)


class CompiledBlock(FusedBlock):
    """The same, compiled; with a mask, or for one position, as `FusedBlock`."""

    kind = "compiled, with one product for queries, keys and values"
    #: torch.compile's; the rehearsal on a CPU uses "eager".
    backend = "inductor"

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, last_token_only: bool = False
    ) -> torch.Tensor:
        """Maps (B, S, D) to (B, S, D), or to (B, 1, D), the last position, with `last_token_only`."""
        if attention_mask is not None or last_token_only:
            return self._forward(hidden_states, attention_mask, last_token_only)
        from torch._dynamo import mark_dynamic  # takes long to import, as torch.compile itself does

        norms = (self.block.layer_norm1, self.block.layer_norm2)
        weights: list[tuple[torch.Tensor, ...]] = [(norm.weight, norm.bias) for norm in norms]
        weights += [part.tensors() for part in (self.qkv, self.out, self.fc1, self.fc2)]
        if len(hidden_states) > 1:  # a batch of 1 is always a case of its own to torch.compile
            hidden_states = hidden_states.detach()  # the mark is for this call, not for the caller's tensor
            mark_dynamic(hidden_states, 0)
        activation = _activation(self.block.mlp.config.hidden_act)
        return _compiled(self.backend)(hidden_states, weights, self.num_heads, self.scale, norms[0].eps, activation)


@functools.cache
def _activation(name: str) -> nn.Module:
    """One module for all blocks: torch.compile would compile again for each of several."""
    return ACT2FN[name]


@functools.cache
def _compiled(backend: str) -> Any:
    return torch.compile(_block, backend=backend)


def _block(
    states: torch.Tensor, weights: list[tuple[torch.Tensor, ...]], heads: int, scale: float, eps: float, activation: Any
) -> torch.Tensor:
    """A pre-norm block (B, S, D) -> (B, S, D); weights and biases of norm 1, norm 2, qkv, out, fc1, fc2."""
    (gain1, shift1), (gain2, shift2), qkv, out, fc1, fc2 = weights
    width = states.shape[-1:]
    attended = _attend(F.linear(F.layer_norm(states, width, gain1, shift1, eps), *qkv), None, heads, scale)
    states = states + F.linear(attended, *out)
    return states + F.linear(activation(F.linear(F.layer_norm(states, width, gain2, shift2, eps), *fc1)), *fc2)


def _attend(qkv: torch.Tensor, mask: torch.Tensor | None, heads: int, scale: float) -> torch.Tensor:
    """(B, S, 3 D) queries, keys and values -> (B, S, D)."""
    batch, length, width = qkv.shape
    query, key, value = qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)  # (B, H, S, D/H)
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return output.transpose(1, 2).reshape(batch, length, width // 3)
