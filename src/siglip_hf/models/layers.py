"""The Transformer encoder that both towers share, and the attention that pools image tokens.

Source: SigLIP uses the pre-norm ViT of big_vision (`models/vit.py`) in both towers, without a causal mask in the text
tower. Attention runs through transformers' attention interface, so every implementation registered there is available.

Shapes: B batch, S tokens (N patches or L text tokens), D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siglip_hf.models.configuration_siglip import SiglipTextConfig, SiglipVisionConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out: the reference for the other implementations, and the only one that returns its weights.

    Args:
        module: The calling attention layer.
        query: (B, H, S, D / H).
        key: (B, H, T, D / H).
        value: (B, H, T, D / H).
        attention_mask: Added to the scores (broadcast to (B, H, S, T)), or None.
        scaling: Factor on the scores.
        dropout: Dropout probability of the weights.

    Returns:
        The output (B, S, H, D / H) and the weights (B, H, S, T).
    """
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, S, T)
    if attention_mask is not None:
        scores = scores + attention_mask
    # In float32 whatever the dtype: a softmax over hundreds of keys loses too much in half precision.
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer is nothing but its weight and bias: not quantized, adapted, offloaded, split or hooked."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.bias is not None
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    )


class _MultiHeadAttention(nn.Module):
    """Queries of one sequence attend to keys and values of another, through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init.xavier_uniform_(projection.weight)
            init.zeros_(projection.bias)

    def _attend(
        self,
        query_states: torch.Tensor,
        key_value_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_implementation: str | None = None,
        lengths: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, D) queries over (B, T, D) keys and values -> (B, S, D), and weights if there are any.

        `lengths` tells flash attention where sequences end that stand in one row: B is 1 then.
        """
        if lengths is None and query_states.shape[1] == 1 and self._can_fold(attention_mask, attn_implementation):
            return self._attend_with_one_query(query_states, key_value_states, attention_mask), None
        query = self._split_heads(self.q_proj(query_states))  # (B, H, S, D / H)
        key = self._split_heads(self.k_proj(key_value_states))  # (B, H, T, D / H)
        value = self._split_heads(self.v_proj(key_value_states))  # (B, H, T, D / H)
        implementation = attn_implementation or self.config._attn_implementation
        if not torch.compiler.is_compiling() and len(query) == 0:
            implementation = "eager"  # transformers' others cannot reshape an empty batch
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            is_causal=False,
            scaling=self.scale,
            dropout=self.dropout if self.training else 0.0,
            **(lengths or {}),
        )
        return self.out_proj(output.flatten(2).contiguous()), weights  # (B, S, H, D / H) -> (B, S, D)

    def _can_fold(self, attention_mask: torch.Tensor | None, attn_implementation: str | None) -> bool:
        """Whether `_attend_with_one_query` gives the same as the plain way."""
        return (
            # With gradients not: the keys' bias would get none, which distributed training waits for. A traced graph
            # must not depend on the mode it was traced in: `torch.jit.trace` compares the graphs of both.
            (not torch.is_grad_enabled() or torch.jit.is_tracing())
            and (attn_implementation or self.config._attn_implementation) == "sdpa"
            and (attention_mask is None or attention_mask.dtype == torch.bool)
            and is_plain_linear(self.k_proj)
            and is_plain_linear(self.v_proj)
        )

    def _attend_with_one_query(
        self, query_states: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, 1, D) queries, one for each sequence, over (B, T, D) -> (B, 1, D), without making keys and values.

        q (K x) = (q K) x and w (V x) = V (w x): with a single query it is less work to project the query and the mean
        than every token, T x D x H instead of T x D x D. The keys' bias adds the same to all scores, and the weights
        sum to 1, so that the values' bias is added once.
        """
        heads = self.num_heads
        query = self.q_proj(query_states)[:, 0].unflatten(-1, (heads, -1)).transpose(0, 1)  # (H, B, D / H)
        key_weight = self.k_proj.weight.unflatten(0, (heads, -1))  # (H, D / H, D)
        value_weight = self.v_proj.weight.unflatten(0, (heads, -1))  # (H, D / H, D)
        folded = (query * self.scale @ key_weight).transpose(0, 1)  # (B, H, D)
        scores = folded @ states.transpose(1, 2)  # (B, H, T)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, :, 0], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(states.dtype)
        mean = (weights @ states).transpose(0, 1)  # (H, B, D)
        values = (mean @ value_weight.transpose(1, 2)).permute(1, 0, 2).flatten(1)  # (B, D)
        return self.out_proj(values + self.v_proj.bias).unsqueeze(1)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, H, S, D / H)."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class SiglipAttention(_MultiHeadAttention):
    """Self-attention of an encoder block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_implementation: str | None = None,
        last_token_only: bool = False,
        lengths: dict[str, Any] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps (B, S, D) to (B, S, D) and the attention weights (B, H, S, S), which only "eager" has.

        With `last_token_only` only the last position asks: (B, 1, D) and (B, H, 1, S); no mask then. For `lengths` see
        `Packing.flash_lengths`.
        """
        queries = hidden_states[:, -1:] if last_token_only else hidden_states
        return self._attend(queries, hidden_states, attention_mask, attn_implementation, lengths)


class SiglipPoolingAttention(_MultiHeadAttention):
    """Cross-attention of the pooling head: one learned probe reads all image tokens.

    Published checkpoints hold the three input projections as one `in_proj_weight` (3 D, D); `registration` splits it on
    load and merges it on save. Separate `nn.Linear` layers are what quantization, LoRA, offload and export understand.
    `load_state_dict` takes both forms: the Trainer resumes from files as they are.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_split_published)

    def forward(
        self,
        probe: torch.Tensor,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_implementation: str | None = None,
        lengths: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps a probe (B, 1, D) and image tokens (B, N, D) to (B, 1, D) and the weights (B, H, 1, N) if "eager"."""
        return self._attend(probe, hidden_states, attention_mask, attn_implementation, lengths)


def _split_published(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        joined = state_dict.pop(f"{prefix}in_proj_{kind}", None)
        if joined is not None:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3), strict=True):
                state_dict[f"{prefix}{name}.{kind}"] = part.clone()  # `assign=True` makes it the parameter


class SiglipMLP(nn.Module):
    """The MLP of a block."""

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        for layer in (self.fc1, self.fc2):
            init.xavier_uniform_(layer.weight)
            init.normal_(layer.bias, std=1e-6)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., D) to (..., D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SiglipEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm Transformer block; its output is one of the `hidden_states` that a tower returns.

    Attributes:
        packed: What computes in its place without gradients, once `siglip_hf.optimize` has packed its weights.
    """

    packed: Any = None

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.embed_dim = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        last_token_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Maps (B, S, D) to (B, S, D), or to (B, 1, D), the last position, with `last_token_only`."""
        packed = self.packed  # once: another thread may have the weights restored
        serves = packed is not None and "lengths" not in kwargs
        if serves and packed.serves(hidden_states, kwargs.get("attn_implementation")):
            return packed(hidden_states, attention_mask, last_token_only)
        attended, _ = self.self_attn(
            self.layer_norm1(hidden_states), attention_mask, last_token_only=last_token_only, **kwargs
        )
        hidden_states = (hidden_states[:, -1:] if last_token_only else hidden_states) + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SiglipEncoder(nn.Module):
    """The blocks of a tower."""

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        last_token_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Maps (B, S, D) to (B, S, D), or to (B, 1, D) with `last_token_only`: the last block skips the rest."""
        final = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states, attention_mask, last_token_only=last_token_only and index == final, **kwargs
            )
        return hidden_states
