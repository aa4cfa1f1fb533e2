"""Encoder blocks for inference on a CPU, on oneDNN's linear layers with prepacked weights.

One product makes queries, keys and values; the activation and the residual sums are part of the products. Weights are
stored in the order in which the matrix units read them, so that no call packs them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from siglip_hf.inference.optimize import onednn
from siglip_hf.models.layers import SiglipBlock, SiglipEncoderLayer, is_plain_linear

#: Attention scores made at a time; 4 MiB in bfloat16 stay in the cache.
_SCORES_AT_A_TIME = 2**21

#: Bytes of an MLP's inner states made at a time. More than 32 MiB come as fresh pages from the kernel at every call.
_STATES_AT_A_TIME = 20 * 2**20

#: Numbers quantized at a time; 1 MiB in float32 stays in the cache.
_QUANTIZED_AT_A_TIME = 2**18


def is_packable(block: nn.Module) -> bool:
    """Whether a block is a plain one on the CPU, without hooks, adapters or quantized weights."""
    if type(block) is not SiglipEncoderLayer:
        return False
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in block.modules()
    )
    return not hooked and all(
        is_plain_linear(linear) and linear.weight.device.type == "cpu" for linear in linears(block)
    )


def linears(block: SiglipEncoderLayer) -> tuple[nn.Linear, ...]:
    """The linear layers of a block: queries, keys, values, their output, and the two of the MLP."""
    attention, mlp = block.self_attn, block.mlp
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2


def release(block: SiglipEncoderLayer) -> None:
    """Drops the weights of a block's linear layers; `PackedEncoderLayer.unpack_into` brings them back."""
    for linear in linears(block):
        linear.to("meta")


class PackedLinear:
    """The weights of a linear layer, or of several with the same input, in oneDNN's order.

    Args:
        layers: Their outputs come one after the other in the last dimension.
        dtype: Of weights, inputs and outputs.
        activation: Name of the activation that follows.
    """

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype, activation: str | None = None):
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # cat copies even a single one
        self.weight: Any = onednn.pack(weight)
        self.bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype)
        self.fused = activation if activation in onednn.FUSED_ACTIVATIONS else None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out), with the activation if it is one of those that can be fused."""
        return onednn.linear(states, self.weight, self.bias, self.fused)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight (out, in) and the bias (out,), bit for bit as they were packed."""
        return self.weight.to_dense(), self.bias

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that the results depend on."""
        return self.unpack()

    def __deepcopy__(self, memo: Any) -> PackedLinear:
        return self  # nothing ever writes to it

    def add_to(self, residual: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out) and adds it to `residual` (..., out)."""
        return onednn.linear_add(residual, states, self.weight, self.bias)


class Int8Linear(PackedLinear):
    """As `PackedLinear`, multiplied in int8: weights per output, inputs per call (VNNI has twice bfloat16's rate).

    Args:
        layers: Their outputs come one after the other in the last dimension.
        dtype: Of inputs and outputs.
        activation: Name of the activation that follows.
    """

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype, activation: str | None = None):
        weight = torch.cat([layer.weight.detach() for layer in layers]).float()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (out,)
        packed = onednn.pack_int8((weight / scales[:, None]).round().to(torch.int8))
        self.weight = packed, scales, torch.zeros(len(weight), dtype=torch.long)
        self.bias = torch.cat([layer.bias.detach() for layer in layers]).float()
        self.dtype = dtype
        self.fused = activation if activation in onednn.FUSED_ACTIVATIONS else None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that the results depend on."""
        packed, scales, _ = self.weight
        return packed.to_dense(), scales, self.bias

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out), with the activation if it is one of those that can be fused."""
        return onednn.linear_int8(_quantize(states), self.weight, self.bias, self.dtype, self.fused)

    def add_to(self, residual: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out) and adds it to `residual` (..., out)."""
        return onednn.linear_int8_add(residual, _quantize(states), self.weight, self.bias, self.dtype)


def _quantize(states: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """States (..., in) as uint8 of the same shape, with one scale and one zero point: states = scale * (uint8 - zero).

    The rounding is done in float32 on a part at a time, which stays in the cache.

    Raises:
        ValueError: For NaN or infinity.
    """
    least, largest = (bound.item() for bound in torch.aminmax(states))
    if not math.isfinite(largest - least):
        raise ValueError("the states hold NaN or infinity, which int8 cannot; look for them in `pixel_values`")
    least, largest = min(least, 0.0), max(largest, 0.0)
    scale = max(largest - least, 1e-30) / 254  # a step is left for the zero point's rounding
    zero = math.ceil(-least / scale)
    quantized = torch.empty(states.shape, dtype=torch.uint8)
    parts, targets = (tensor.reshape(-1).split(_QUANTIZED_AT_A_TIME) for tensor in (states, quantized))
    for part, target in zip(parts, targets, strict=True):
        steps = part.to(torch.float32, copy=True).mul_(1 / scale)
        target.copy_(steps.add_(zero + 0.5))  # the copy cuts off the fraction
    return quantized, scale, zero


class PackedEncoderLayer(SiglipBlock):
    """A block with packed weights, made from a plain one. It computes only: no gradients, no saving, no other dtype.

    Args:
        block: A block for which `is_packable` holds. Its layer norms are shared, its linear weights copied.
        dtype: float32 or bfloat16.
        int8: Multiply by the weights in int8.
    """

    def __init__(self, block: SiglipEncoderLayer, dtype: torch.dtype, int8: bool = False):
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.dtype = dtype
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.intermediate_size = mlp.config.intermediate_size
        self.layer_norm1, self.layer_norm2 = block.layer_norm1, block.layer_norm2
        linear = Int8Linear if int8 else PackedLinear
        self.qkv = linear(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.out = linear(attention.out_proj, dtype=dtype)
        self.fc1 = linear(mlp.fc1, dtype=dtype, activation=mlp.config.hidden_act)
        self.fc2 = linear(mlp.fc2, dtype=dtype)
        self.activation_fn = None if self.fc1.fused else mlp.activation_fn

    def packed_tensors(self) -> Iterator[torch.Tensor]:
        """The packed weights, which are no parameters, one after the other."""
        for packed in (self.qkv, self.out, self.fc1, self.fc2):
            yield from packed.tensors()

    def unpack_into(self, block: SiglipEncoderLayer) -> None:
        """Gives a block whose linear layers were moved to the meta device their weights back."""
        tensors = [packed.unpack() for packed in (self.qkv, self.out, self.fc1, self.fc2)]
        (weight, bias), *others = tensors
        # Clones, since savers refuse parameters that share storage.
        parts = [[part.clone() for part in tensor.chunk(3)] for tensor in (weight, bias)]
        restored = [*zip(*parts, strict=True), *others]
        for linear, (weight, bias) in zip(linears(block), restored, strict=True):
            linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
            linear.bias = nn.Parameter(bias, linear.bias.requires_grad)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        last_token_only: bool = False,
        attn_implementation: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Maps (B, S, D) to (B, S, D), or to (B, 1, D), the last position, with `last_token_only`.

        Raises:
            ValueError: If gradients or attention weights are wanted, or for a dtype other than the block's.
        """
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise ValueError("an optimized model has no gradients; load the model again, without siglip_hf.optimize")
        if attn_implementation == "eager":
            raise ValueError(
                "an optimized model does not return attention weights; load the model again, without siglip_hf.optimize"
            )
        if hidden_states.dtype != self.dtype:
            raise ValueError(f"this model was optimized for {self.dtype}, and its states are {hidden_states.dtype}")
        batch, length = hidden_states.shape[:2]
        at_a_time = max(1, _STATES_AT_A_TIME // (length * self.intermediate_size * self.dtype.itemsize))
        if batch <= at_a_time:
            return self._forward(hidden_states, attention_mask, last_token_only)
        even = math.ceil(batch / math.ceil(batch / at_a_time))
        parts = hidden_states.split(even)
        masks = [attention_mask] * len(parts)
        if attention_mask is not None and len(attention_mask) == batch:
            masks = attention_mask.split(even)
        return torch.cat([self._forward(part, mask, last_token_only) for part, mask in zip(parts, masks, strict=True)])

    def _forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, last_token_only: bool
    ) -> torch.Tensor:
        """As `forward`, for as many pictures or texts as go through the block at once."""
        attended = self._attend(self.qkv(self.layer_norm1(hidden_states)), attention_mask)  # (B, S, D)
        hidden_states = self.out.add_to(hidden_states, attended)
        if last_token_only:
            hidden_states = hidden_states[:, -1:]
        intermediate = self.fc1(self.layer_norm2(hidden_states))  # (B, S, intermediate)
        if self.activation_fn is not None:
            intermediate = self.activation_fn(intermediate)
        return self.fc2.add_to(hidden_states, intermediate)

    def _attend(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, S, 3 D) queries, keys and values -> (B, S, D)."""
        batch, length = qkv.shape[:2]
        split = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, S, D / H)
        if mask is None and self.dtype == torch.bfloat16:
            output = self._attend_in_bfloat16(split)
        else:
            query, key, value = split
            output = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=self.scale)
            output = output.transpose(1, 2)
        return output.reshape(batch, length, -1)

    def _attend_in_bfloat16(self, split: torch.Tensor) -> torch.Tensor:
        """(3, B, H, S, D / H) -> (B, S, H, D / H). Plain products: torch's fused kernel takes 1.5 times as long."""
        _, batch, heads, length, width = split.shape
        output = split.new_empty(batch, length, heads, width)
        unused = split.new_empty(1, 1, 1)
        heads_at_a_time = max(1, _SCORES_AT_A_TIME // length**2)
        pictures_at_a_time = max(1, heads_at_a_time // heads)
        for target, part in zip(output.split(pictures_at_a_time), split.split(pictures_at_a_time, dim=1), strict=True):
            query, key, value = part.reshape(3, -1, length, width)  # the products want each head in one piece
            attended = torch.empty_like(query)
            for start in range(0, len(query), heads_at_a_time):
                some = slice(start, start + heads_at_a_time)
                scores = torch.baddbmm(unused, query[some], key[some].transpose(1, 2), beta=0, alpha=self.scale)
                torch.bmm(scores.softmax(dim=-1), value[some], out=attended[some])  # softmax sums in float32
            target.copy_(attended.view(-1, heads, length, width).transpose(1, 2))
        return output

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedEncoderLayer:
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.dtype != self.dtype or moved.device.type != "cpu":
            raise ValueError(
                f"an optimized model stays on the CPU in {self.dtype}; load the model again for {moved.dtype} on "
                f"{moved.device}"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("an optimized model cannot be saved; save the model before siglip_hf.optimize")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("an optimized model cannot take other weights; load them before siglip_hf.optimize")
