"""Tiny models with random weights that the tests of other libraries share."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
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


# Imports what takes seconds once, and then runs each request in a fork of its own.
_STOCK = """
import sys
sys.modules["siglip_hf"] = None  # an import of it fails
import json, os, runpy, traceback, transformers
from transformers import AutoModel, AutoModelForImageTextToText
for line in sys.stdin:
    request = json.loads(line)
    if child := os.fork():
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    output = open(request["output"], "w")
    os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    status = 1
    try:
        sys.argv = request["arguments"]
        if request["code"]:
            exec(request["code"], {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""


@functools.cache
def _stock_process() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # closes its input, at which it ends
    return process


def run_without_siglip_hf(code: str, *arguments: str | Path) -> str:
    """Runs code in a Python that cannot import this package, so with stock transformers; returns what it prints.

    Args:
        code: What to run; empty for the script that the first of the arguments names.
        *arguments: `sys.argv` of a script; for code what follows `sys.argv[0]`.
    """
    process, argv = _stock_process(), [*map(str, arguments)] if not code else ["-c", *map(str, arguments)]
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"code": code, "arguments": argv, "output": output.name}
        print(json.dumps(request), file=process.stdin, flush=True)
        assert process.stdout is not None
        status, printed = process.stdout.readline().strip(), output.read()
    if status != "0":
        raise RuntimeError(f"stock process failed:\n{printed[-3000:]}")
    return printed
