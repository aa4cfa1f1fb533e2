"""Encoder blocks for inference on a CPU, on oneDNN's linear layers with prepacked weights.

One product makes queries, keys and values; the activation and the residual sums are part of the products. Weights are
stored in the order in which the matrix units read them, so that no call packs them again.

A packed block stays where it is in its model. Only its linear layers no longer hold their weights: code that reads one
(a saver, an optimizer, `.to`, an adapter, a forward pass with gradients) gets it back bit for bit, and the block
is a plain one from then on.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from siglip_hf.inference.optimize import onednn
from siglip_hf.models.layers import SiglipEncoderLayer, is_plain_linear

#: Attention scores made at a time; 4 MiB in bfloat16 stay in the cache.
_SCORES_AT_A_TIME = 2**21

#: Bytes of an MLP's inner states made at a time. More than 32 MiB come as fresh pages from the kernel at every call.
_STATES_AT_A_TIME = 20 * 2**20

#: Numbers quantized at a time; 1 MiB in float32 stays in the cache.
_QUANTIZED_AT_A_TIME = 2**18


_RESTORING = threading.RLock()


def version_of(parameter: torch.Tensor) -> int:
    """Autograd's counter of writes; inference tensors have none."""
    return 0 if parameter.is_inference() else parameter._version


def _nobody() -> None:
    """The reference of a parameter that no one holds."""


def is_packable(block: nn.Module, device: str = "cpu") -> bool:
    """Whether a block is a plain one on a type of device, without hooks, adapters or quantized weights."""
    if type(block) is not SiglipEncoderLayer or block.packed is not None:
        return False
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in block.modules()
    )
    return not hooked and all(
        is_plain_linear(linear) and linear.weight.device.type == device for linear in linears(block)
    )


def linears(block: SiglipEncoderLayer) -> tuple[nn.Linear, ...]:
    """The linear layers of a block: queries, keys, values, their output, and the two of the MLP."""
    attention, mlp = block.self_attn, block.mlp
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2


def is_held(block: SiglipEncoderLayer) -> bool:
    """Whether someone beside the block, such as an optimizer, holds one of its linear weights, or it has a gradient.

    Counted are Python's references; a forward pass of another thread holds them too.
    """
    return any(
        # One reference each: the layer's dictionary, this loop, the call.
        sys.getrefcount(parameter) > 3 or parameter.grad is not None  # type: ignore[union-attr]
        for linear in linears(block)
        for parameter in linear._parameters.values()
    )


def weights_state(module: nn.Module) -> tuple[Any, ...]:
    """What changes when a module's weights do: place in memory, autograd's counter of writes, form. Restores nothing.

    Writing through `weight.data` does not show.
    """
    state: list[Any] = []
    for part in module.modules():
        parameters = part._parameters
        if isinstance(parameters, GivenUp):
            state.append((id(parameters.packed), parameters.is_changed()))
        else:
            weights = [p for p in parameters.values() if p is not None]
            state.extend((p.data_ptr(), version_of(p), p.dtype, p.device) for p in weights)
    return tuple(state)


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

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The weight (out, in) and the bias (out,), bit for bit as they were packed."""
        return self.weight.to_dense(), self.bias

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
        """The weight in int8, the scales (out,) of its outputs, and the bias (out,)."""
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


class PackedBlock:
    """The weights of a block, packed, and its forward pass without gradients.

    Made, it stands in the block as `block.packed`, and the block's linear layers have given their weights up.

    Args:
        block: A block for which `is_packable` holds.
        int8: Multiply by the weights in int8; they cannot be had back then.
    """

    linear: type[PackedLinear] = PackedLinear
    kind = "on oneDNN with packed weights; nothing is compiled, so nothing warms up"

    def __init__(self, block: SiglipEncoderLayer, int8: bool = False):
        attention, mlp = block.self_attn, block.mlp
        self.block, self.layers = block, linears(block)
        self.dtype = dtype = mlp.fc1.weight.dtype
        self.device = mlp.fc1.weight.device
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.intermediate_size = mlp.config.intermediate_size
        linear = Int8Linear if int8 else self.linear
        self.qkv = linear(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.out = linear(attention.out_proj, dtype=dtype)
        self.fc1 = linear(mlp.fc1, dtype=dtype, activation=mlp.config.hidden_act)
        self.fc2 = linear(mlp.fc2, dtype=dtype)
        self.activation_fn = None if self.fc1.fused else mlp.activation_fn
        self.is_trainable = any(p.requires_grad for layer in self.layers for p in layer.parameters())
        self.given_up = [GivenUp(layer._parameters, self) for layer in self.layers]
        block.packed = self
        for layer, parameters in zip(self.layers, self.given_up, strict=True):
            layer._parameters = parameters

    def tensors(self, layer: nn.Linear) -> tuple[torch.Tensor, ...]:
        """What one of the linear layers gave up: weight and bias; in int8 what stands for them."""
        place = self.layers.index(layer)
        if place >= 3:
            return (self.out, self.fc1, self.fc2)[place - 3].tensors()
        return tuple(tensor.chunk(3)[place] for tensor in self.qkv.tensors())

    @functools.cached_property
    def _parts(self) -> list[tuple[dict[str, Any], str, Any]]:
        """What the packed pass goes around: all of it must stay as it is, and no hook may be on it."""
        owners: list[dict[str, Any]] = [owner._modules for owner in self.block.modules()]
        return [(modules, name, part) for modules in owners for name, part in modules.items()]

    def serves(self, hidden_states: torch.Tensor, attn_implementation: str | None = None) -> bool:
        """Whether the packed pass gives what the plain one would, but for rounding."""
        return (
            hidden_states.dtype == self.dtype
            and attn_implementation in (None, "sdpa")
            and not (torch.is_grad_enabled() and (hidden_states.requires_grad or self.is_trainable))
            and not torch.is_autocast_enabled(self.device.type)
            and not (self.block.training and self.block.self_attn.dropout)
            and hidden_states.device == self.device
            and all(
                modules.get(name) is part
                and part is not None
                and not part._forward_hooks
                and not part._forward_pre_hooks
                and "forward" not in part.__dict__
                for modules, name, part in self._parts
            )
            and not any(parameters.is_changed() for parameters in self.given_up)
        )

    def restore(self) -> None:
        """Gives the linear layers their weights back; the block is a plain one then.

        Raises:
            ValueError: In int8.
        """
        # Inference mode would make tensors that can never be trained.
        with _RESTORING, torch.inference_mode(False), torch.no_grad():
            if self.block.packed is not self:
                return
            restored = [parameters.held() for parameters in self.given_up]
            for layer, given_up, parameters in zip(self.layers, self.given_up, restored, strict=True):
                if None not in parameters.values():
                    continue
                if isinstance(self.out, Int8Linear):
                    raise ValueError(
                        "a model optimized to int8 no longer has its weights, and so no gradients, attention weights, "
                        "adapters, other dtypes or state dict; load it again, without siglip_hf.optimize"
                    )
                for name, tensor in zip(("weight", "bias"), self.tensors(layer), strict=True):
                    if parameters[name] is None:
                        # A clone, since savers refuse parameters that share storage.
                        parameters[name] = nn.Parameter(tensor.clone(), given_up.were[name][2])
            for layer, given_up, parameters in zip(self.layers, self.given_up, restored, strict=True):
                given_up.now = layer._parameters = parameters
            self.block.packed = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedBlock:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.__dict__.pop("_parts", None)
        copied.block, copied.layers, copied.given_up = copy.deepcopy((self.block, self.layers, self.given_up), memo)
        return copied

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled block is a plain one

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, last_token_only: bool = False
    ) -> torch.Tensor:
        """Maps (B, S, D) to (B, S, D), or to (B, 1, D), the last position, with `last_token_only`."""
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
        attended = self._attend(self.qkv(self.block.layer_norm1(hidden_states)), attention_mask)  # (B, S, D)
        hidden_states = self.out.add_to(hidden_states, attended)
        if last_token_only:
            hidden_states = hidden_states[:, -1:]
        intermediate = self.fc1(self.block.layer_norm2(hidden_states))  # (B, S, intermediate)
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


class GivenUp(dict[str, Any]):
    """The parameters of a linear layer that is packed: reading them restores the block first.

    It takes the place of the layer's own dictionary, through which PyTorch reaches a parameter in every way there is.

    Args:
        parameters: What the layer had. Not kept alive: if nothing else holds them, their memory is free.
        packed: Where the weights are.
    """

    def __init__(self, parameters: dict[str, Any], packed: PackedBlock):
        super().__init__(dict.fromkeys(parameters))
        self.packed = packed
        # What gives the parameter if someone holds it, its version, and whether it is trained.
        self.were: dict[str, tuple[Callable[[], Any], int, bool]] = {
            name: (weakref.ref(p), version_of(p), p.requires_grad) for name, p in parameters.items()
        }
        self.now: dict[str, Any] | None = None

    def is_changed(self) -> bool:
        """Whether a holder of a parameter has written to it, as an optimizer would."""
        return any((p := were()) is not None and version_of(p) != version for were, version, _ in self.were.values())

    def tensors(self, layer: nn.Linear) -> dict[str, torch.Tensor]:
        """The layer's numbers by name, to be read; restores nothing."""
        return dict(zip(("weight", "bias", "more"), self.packed.tensors(layer), strict=False))

    def held(self) -> dict[str, Any]:
        """The parameters that someone still holds, and None for the others."""
        return {name: reference() for name, (reference, _, _) in self.were.items()}

    def restored(self) -> dict[str, Any]:
        """The layer's dictionary, after the block has been restored."""
        if self.now is None:
            self.packed.restore()
        return self.now  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        if self.now is not None or self.is_changed():
            return copy.deepcopy(self.restored(), memo)
        copied = GivenUp({}, self.packed)
        dict.update(copied, dict.fromkeys(self.were))
        copied.were = {name: (_nobody, 0, requires_grad) for name, (_, _, requires_grad) in self.were.items()}
        memo[id(self)] = copied
        copied.packed = copy.deepcopy(self.packed, memo)
        return copied

    def __reduce__(self) -> Any:
        return dict, (self.restored(),)

    def __getitem__(self, name: str) -> Any:
        return self.restored()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.restored()[name] = value

    def __delitem__(self, name: str) -> None:
        del self.restored()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.restored())

    def get(self, name: str, default: Any = None) -> Any:
        return self.restored().get(name, default)

    def items(self) -> Any:
        return self.restored().items()

    def values(self) -> Any:
        return self.restored().values()

    def pop(self, *arguments: Any) -> Any:
        return self.restored().pop(*arguments)

    def copy(self) -> dict[str, Any]:
        return dict(self.restored())
