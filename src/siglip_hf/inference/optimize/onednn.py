"""The one door to torch's private operators on oneDNN: linear layers whose weights are packed once.

`torch.ops.mkldnn` and `torch.ops.onednn` are what torch's own compiler emits; they are not documented and may change.
Nothing else in this package calls them, and `why_not` tries them before they are first used: where an operator is
missing or gives other numbers, models stay plain.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from siglip_hf.files import first_line

#: Activations that oneDNN applies to a product while it is in the registers: our name -> its name and algorithm.
FUSED_ACTIVATIONS = {
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu_new": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
}
_NO_ACTIVATION = ("none", "")

# How far a product of the self-test, about 1 in size, may be from torch's own, in the dtype's rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def pack(weight: torch.Tensor) -> Any:
    """A weight (out, in) in the order in which the matrix units read it; `.to_dense()` gives it back bit for bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear(states: torch.Tensor, weight: Any, bias: torch.Tensor, activation: str | None = None) -> torch.Tensor:
    """Maps (..., in) to (..., out), with an activation of `FUSED_ACTIVATIONS` or none."""
    name, algorithm = FUSED_ACTIVATIONS[activation] if activation else _NO_ACTIVATION
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, name, [], algorithm)


def linear_add(residual: torch.Tensor, states: torch.Tensor, weight: Any, bias: torch.Tensor) -> torch.Tensor:
    """Maps (..., in) to (..., out) and adds it to `residual` (..., out)."""
    return torch.ops.mkldnn._linear_pointwise.binary(states, residual, weight, bias, "add")


def pack_int8(weight: torch.Tensor) -> Any:
    """An int8 weight (out, in) in the order of the matrix units."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def linear_int8(
    quantized: tuple[torch.Tensor, float, int],
    weight: tuple[Any, torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    dtype: torch.dtype,
    activation: str | None = None,
) -> torch.Tensor:
    """Maps uint8 (..., in), its scale and its zero point to `dtype` (..., out).

    Args:
        quantized: the states, their scale and their zero point.
        weight: packed, with the scale and the zero point (out,) of each output.
        bias: float32 (out,).
        dtype: of the result.
        activation: one of `FUSED_ACTIVATIONS`, or none.
    """
    name, algorithm = FUSED_ACTIVATIONS[activation] if activation else _NO_ACTIVATION
    return torch.ops.onednn.qlinear_pointwise(*quantized, *weight, bias, 1.0, 0, dtype, name, [], algorithm)


def linear_int8_add(
    residual: torch.Tensor,
    quantized: tuple[torch.Tensor, float, int],
    weight: tuple[Any, torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `linear_int8`, added to `residual` (..., out)."""
    residual = residual.contiguous()  # the product takes it to be so, without a check
    return torch.ops.onednn.qlinear_pointwise.binary(
        *quantized, *weight, residual, bias, 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], ""
    )


@functools.cache
def why_not(dtype: torch.dtype, int8: bool = False) -> str | None:
    """Tries the operators on a small product, once for each dtype.

    Args:
        dtype: float32 or bfloat16, of inputs and outputs.
        int8: try the products in int8.

    Returns:
        Why they cannot be used here, or None if they work.
    """
    try:
        difference = _try_int8(dtype) if int8 else _try(dtype)
    except Exception as error:  # an operator may be missing, or take other arguments, or refuse this processor
        return f"torch's operators on oneDNN do not work here ({type(error).__name__}: {first_line(error)})"
    if not difference <= _TOLERANCE[dtype]:
        return f"torch's operators on oneDNN give other numbers here (off by {difference:.1e})"
    return None


def _sample(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """States (2, 3, 32), a weight (16, 32), a bias (16,) and a residual (2, 3, 16); products are about 1 in size."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 32), (16, 32), (16,), (2, 3, 16))
    states, weight, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    return states.to(dtype), (weight / 32**0.5).to(dtype), bias.to(dtype), residual.to(dtype)


def _try(dtype: torch.dtype) -> float:
    """The largest difference from torch's own products, activations and sums."""
    states, weight, bias, residual = _sample(dtype)
    packed = pack(weight)
    plain = nn.functional.linear(states, weight, bias)
    pairs = [
        (linear(states, packed, bias), plain),
        (linear(states, packed, bias, "relu"), plain.relu()),
        (linear(states, packed, bias, "gelu"), nn.functional.gelu(plain)),
        (linear(states, packed, bias, "gelu_new"), nn.functional.gelu(plain, approximate="tanh")),
        (linear_add(residual, states, packed, bias), plain + residual),
        (packed.to_dense(), weight),
    ]
    return max((ours.float() - theirs.float()).abs().max().item() for ours, theirs in pairs)


def _try_int8(dtype: torch.dtype) -> float:
    """The same for whole numbers, which int8 holds without rounding; relative to the largest result."""
    states, weight, bias, residual = _sample(torch.float32)
    states, weight = (states * 20).round().clamp(-50, 50), (weight * 200).round().clamp(-127, 127)
    quantized = ((states + 50).to(torch.uint8), 1.0, 50)
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.long)
    packed = (pack_int8(weight.to(torch.int8)), ones, zeros)
    plain = nn.functional.linear(states, weight, bias)
    pairs = [
        (linear_int8(quantized, packed, bias, dtype), plain),
        (linear_int8(quantized, packed, bias, dtype, "relu"), plain.relu()),
        (linear_int8_add(residual.to(dtype), quantized, packed, bias, dtype), plain + residual.to(dtype).float()),
    ]
    return max(((ours.float() - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)
