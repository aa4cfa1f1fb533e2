"""Every class of both families as a folder to load from, with inputs and the comparison of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import siglip_hf

from . import tiny

CLASSES = [
    f"{family}{kind}"
    for family in ("Siglip", "Siglip2")
    for kind in ("Model", "TextModel", "VisionModel", "ForImageClassification")
]
WITH_HEAD = [name for name in CLASSES if not name.endswith("TextModel")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows and columns of the NaFlex pictures: one with padding, one in another grid than the learned positions.
SHAPES = torch.tensor([(2, 3), (1, 8)])
# Everything that a model may return and that is compared.
OUTPUTS = ("logits_per_image", "image_embeds", "text_embeds", "last_hidden_state", "pooler_output", "logits")


def model_class(name: str) -> Any:
    """The class of this package by its name."""
    return getattr(siglip_hf, name)


def make(name: str, seed: int = 0) -> Any:
    """A model in eval mode with random values in every parameter."""
    if not name.startswith("Siglip2"):
        config = tiny.joint_config(num_labels=3)
    else:
        vision = {key: value for key, value in tiny.VISION.items() if key != "image_size"} | {"num_patches": 16}
        config = siglip_hf.Siglip2Config(text_config=tiny.TEXT, vision_config=vision, num_labels=3)
    if name.endswith("TextModel"):
        config = config.text_config
    elif name.endswith("VisionModel"):
        config = config.vision_config
    return tiny.randomize(model_class(name)(config), seed)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a model with `save_pretrained`, so with the published names, and returns the folder."""
    make(name).to(dtype).save_pretrained(folder)
    return folder


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs that a class takes: three texts, two pictures."""
    inputs: dict[str, torch.Tensor] = {}
    if not name.endswith(("VisionModel", "Classification")):
        inputs["input_ids"] = tiny.texts()
    if name.endswith("TextModel"):
        return inputs
    if not name.startswith("Siglip2"):
        return inputs | {"pixel_values": tiny.pictures().to(dtype)}
    mask = (torch.arange(8) < SHAPES.prod(1, keepdim=True)).int()  # (B, N)
    pixels = torch.randn(2, 8, 3 * 8 * 8, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(-1)
    return inputs | {"pixel_values": pixels.to(dtype), "pixel_attention_mask": mask, "spatial_shapes": SHAPES}


@torch.no_grad()
def outputs_of(model: Any, name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the model returns, in float32 on the CPU."""
    output = model.eval()(**inputs_of(name, dtype), return_dict=True)
    found = {key: output[key].float().cpu() for key in OUTPUTS if output.get(key) is not None}
    assert found
    # Padding of NaFlex pictures means nothing, and may hold anything.
    if "last_hidden_state" in found and name == "Siglip2VisionModel":
        mask = inputs_of(name)["pixel_attention_mask"].bool()
        found["last_hidden_state"] = found["last_hidden_state"][mask]
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    """Outputs of two models, key by key."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# Of the difference's length to the value's. Hooks keep the pooling head from folding its query into the keys, so that
# sums round in another order.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_rounds_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Outputs of two models that compute the same in another order, in a dtype."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        difference = ((value - other[key]).norm() / other[key].norm()).item()
        assert difference <= ROUNDING[dtype], f"{key} differs by {difference:.2g}"


def assert_same_weights(one: Any, other: Any) -> None:
    """All parameters of two models, bit for bit."""
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        torch.testing.assert_close(
            parameter, second[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_nothing_shared(model: Any) -> None:
    """No two parameters share memory: savers that drop shared tensors would drop one of them."""
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
