"""Tells checkpoints of fixed resolution from NaFlex checkpoints by their weights, whatever their `config.json` says.

Fixed-resolution models embed patches with a convolution (a weight of 4 dimensions), NaFlex with a linear layer (2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

_KEY = "embeddings.patch_embedding.weight"


def refuse_other_kind(
    model: nn.Module, state_dict: Mapping[str, Any] | None, checkpoint_files: Sequence[str] | None
) -> None:
    """Compares a model with the checkpoint that is about to be loaded into it; only the files' headers are read.

    Args:
        model: Any SigLIP model.
        state_dict: The checkpoint's tensors, or None.
        checkpoint_files: Its files, or None.

    Raises:
        ValueError: If one is of fixed resolution and the other is NaFlex; the message says what to load it with.
    """
    expected = next((parameter for name, parameter in model.named_parameters() if name.endswith(_KEY)), None)
    found = _shape(state_dict, checkpoint_files)
    if expected is None or found is None or {len(found), expected.ndim} != {2, 4}:
        return
    name, kind = type(model).__name__, {2: "NaFlex", 4: "fixed-resolution"}
    if len(found) == 4:
        other, model_type = name.replace("Siglip2", "Siglip"), "siglip"
    else:
        other, model_type = name.replace("Siglip", "Siglip2"), "siglip2"
    raise ValueError(
        f"these are {kind[len(found)]} weights ({_KEY} has shape {tuple(found)}), and {name} is a "
        f'{kind[expected.ndim]} model; load them with {other}, and with "model_type": "{model_type}" in config.json'
    )


def _shape(state_dict: Mapping[str, Any] | None, checkpoint_files: Sequence[str] | None) -> Sequence[int] | None:
    """The shape of the patch embedding in a checkpoint, or None if it has none."""
    if state_dict is not None:
        return next((tensor.shape for name, tensor in state_dict.items() if name.endswith(_KEY)), None)
    for file in checkpoint_files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                key = next((name for name in tensors.keys() if name.endswith(_KEY)), None)  # noqa: SIM118
                if key is not None:
                    return tensors.get_slice(key).get_shape()
        elif str(file).endswith(".bin"):
            shape = _shape(torch.load(file, map_location="meta", weights_only=True), None)
            if shape is not None:
                return shape
    return None
