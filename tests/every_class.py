"""Every model class of both families: tiny, with random weights, and inputs for it."""

from typing import Any

import torch

import siglip_hf
import tiny
import tiny_siglip2

NAMES = [
    f"{family}{part}"
    for family in ("Siglip", "Siglip2")
    for part in ("Model", "TextModel", "VisionModel", "ForImageClassification")
]


def config_of(name: str) -> Any:
    """The tiny configuration of a class."""
    module = tiny_siglip2 if name.startswith("Siglip2") else tiny
    joint = module.tiny_config(num_labels=3) if "Classification" in name else module.tiny_config()
    return {"TextModel": joint.text_config, "VisionModel": joint.vision_config}.get(
        name.removeprefix("Siglip2").removeprefix("Siglip"), joint
    )


def model_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a class in evaluation mode."""
    return tiny.shaken(getattr(siglip_hf, name)(config_of(name)), seed).to(dtype)


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What a class takes: two texts, three square pictures, six NaFlex pictures."""
    inputs: dict[str, torch.Tensor] = {}
    if not name.endswith("TextModel"):
        inputs = tiny_siglip2.tiny_pictures() if name.startswith("Siglip2") else tiny.tiny_inputs()
        inputs.pop("input_ids", None)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    if name.endswith(("TextModel", "Siglip2Model", "SiglipModel")):
        inputs["input_ids"] = tiny.tiny_inputs()["input_ids"]
    return inputs


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that a model returns, by name, without gradients; a joint model's towers' outputs are left out."""
    with torch.no_grad():
        output = model(**inputs, return_dict=True)
    return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
