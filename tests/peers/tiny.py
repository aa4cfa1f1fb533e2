"""Tiny models with random weights that the tests of other libraries share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import siglip_hf

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SHAPE | {"vocab_size": 96, "max_position_embeddings": 16}
VISION = SHAPE | {"image_size": 32, "patch_size": 8}


def joint_config(**kwargs: Any) -> siglip_hf.SiglipConfig:
    """A joint configuration; keys of `vision_config` and `text_config` are merged into the tiny ones."""
    text = TEXT | kwargs.pop("text_config", {})
    vision = VISION | kwargs.pop("vision_config", {})
    return siglip_hf.SiglipConfig(text_config=text, vision_config=vision, **kwargs)


def randomize(model: torch.nn.Module, seed: int = 0) -> Any:
    """Fills all parameters, biases and norms too, so that every one of them matters; model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2 and "embedding" not in name and "probe" not in name:
                scale = parameter[0].numel() ** -0.5
            else:
                scale = 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm else noise)
    return model.eval()


def joint_model(seed: int = 0, **kwargs: Any) -> siglip_hf.SiglipModel:
    """A joint model in eval mode."""
    return randomize(siglip_hf.SiglipModel(joint_config(**kwargs)), seed)


def classifier(seed: int = 0, num_labels: int = 3, **kwargs: Any) -> siglip_hf.SiglipForImageClassification:
    """An image classifier in eval mode."""
    return randomize(siglip_hf.SiglipForImageClassification(joint_config(num_labels=num_labels, **kwargs)), seed)


def texts(count: int = 3, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Token ids (count, length)."""
    return torch.randint(2, TEXT["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))


def pictures(count: int = 2, height: int = 32, width: int = 32, seed: int = 2) -> torch.Tensor:
    """Pixels (count, 3, height, width)."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, torch.Tensor]:
    """Inputs of the joint model: three texts, two pictures."""
    return {"input_ids": texts(), "pixel_values": pictures()}


def linears(model: torch.nn.Module, kind: type = torch.nn.Linear) -> set[str]:
    """Names of the layers of a kind."""
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def run_without_siglip_hf(code: str, *arguments: str | Path) -> Any:
    """Runs code in a Python that never imports this package, so with stock transformers; returns what it prints last.

    The code reads its arguments from `sys.argv[1:]` and prints one line of JSON.
    """
    guard = "import sys; sys.modules['siglip_hf'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"stock process failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
