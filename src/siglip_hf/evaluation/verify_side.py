"""One side of `siglip_hf.verify`: loads a checkpoint, runs it, and writes down what came out.

Run as a script in a process of its own: `python verify_side.py REQUEST.json OUTPUT.safetensors`. For the side "stock"
nothing of this package is imported, so that transformers loads its own classes in its own way.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 3
HELD_PIXELS = 64_000_000  # as in `parallel`, of which stock's side knows nothing


def run(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs all cases of a request.

    Args:
        request: `side` ("stock" or "siglip_hf"), `model`, `dtype`, `device`, and `cases`: by name, the files of
            `pictures` and the `texts` or ready-made `input_ids`.

    Returns:
        The tensors by `case/name` (`input_ids` (T, L), `pixel_values`, `image_embeds` (B, E), `text_embeds` (T, E),
        `logits_per_image` (B, T), ...), and what was measured: `classes`, `seconds`, `peak_memory`, `logit_scale`.
    """
    import torch
    from PIL import Image

    before = memory_now()
    seconds: dict[str, float] = {}
    classes = classes_of(request)  # their import takes longer than loading a small model
    started = time.perf_counter()
    model = classes[0].from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]))
    model = model.to(request["device"]).eval()
    image_processor, tokenizer = (part and part.from_pretrained(request["model"]) for part in classes[1:])
    seconds["load"] = time.perf_counter() - started
    dtype = getattr(torch, request["dtype"])
    length = model.config.text_config.max_position_embeddings
    tensors: dict[str, Any] = {}
    for case, given in request["cases"].items():
        parts, spent = [], 0.0
        for paths in few_pixels(given["pictures"]):
            pictures = [Image.open(path).convert("RGB") for path in paths]
            started = time.perf_counter()
            parts.append(image_processor(pictures, return_tensors="pt"))
            spent += time.perf_counter() - started
            del pictures
        inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        seconds.setdefault("pictures", spent)
        if "input_ids" in given:
            inputs["input_ids"] = torch.tensor(given["input_ids"])
        else:
            started = time.perf_counter()
            # Right by default in this package; stock has to be told.
            ask = {} if request["side"] == "siglip_hf" else {"padding": "max_length", "max_length": length}
            texts = tokenizer(given["texts"], truncation=True, return_tensors="pt", **ask)
            seconds.setdefault("texts", time.perf_counter() - started)
            inputs["input_ids"] = texts["input_ids"]
        tensors |= {f"{case}/{name}": value for name, value in inputs.items()}
        inputs = {name: value.to(request["device"]) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.no_grad():
            outputs = model(**inputs)
            if "forward" not in seconds:
                seconds["forward"] = median_seconds(functools.partial(model, **inputs), request["device"])
        for name in ("image_embeds", "text_embeds", "logits_per_image"):
            tensors[f"{case}/{name}"] = outputs[name].float().cpu()
    on_gpu = request["device"].startswith("cuda")
    measured = {
        "classes": [
            f"{type(part).__module__}.{type(part).__qualname__}" for part in (model, image_processor, tokenizer)
        ],
        "seconds": seconds,
        "memory_before": before,
        "peak_memory": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "logit_scale": model.logit_scale.exp().item(),
    }
    return {name: value.contiguous() for name, value in tensors.items()}, measured


def classes_of(request: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The classes of a side: model, image processor (that of Pillow) and tokenizer; None where no text is tokenized."""
    from transformers import AutoConfig, AutoTokenizer

    needs_tokenizer = any("texts" in case for case in request["cases"].values())
    folder = request["model"]
    if request["side"] == "siglip_hf":
        from siglip_hf.models.modeling_siglip import SiglipModel
        from siglip_hf.models.modeling_siglip2 import Siglip2Model
        from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor
        from siglip_hf.preprocessing.image_processing_siglip2 import Siglip2ImageProcessor

        naflex = AutoConfig.from_pretrained(folder).model_type == "siglip2"
        model_class = Siglip2Model if naflex else SiglipModel
        image_processor_class = Siglip2ImageProcessor if naflex else SiglipImageProcessor
    else:
        kind = AutoConfig.from_pretrained(folder).model_type
        prefix, package = kind.capitalize(), f"transformers.models.{kind}"
        model_class = getattr(importlib.import_module(f"{package}.modeling_{kind}"), f"{prefix}Model")
        image_processor_class = getattr(
            importlib.import_module(f"{package}.image_processing_pil_{kind}"), f"{prefix}ImageProcessorPil"
        )
    return model_class, image_processor_class, AutoTokenizer if needs_tokenizer else None


def few_pixels(paths: list[str]) -> list[list[str]]:
    """Pictures in groups that may lie in memory together: of `HELD_PIXELS` pixels, or one of more."""
    from PIL import Image

    groups: list[list[str]] = [[]]
    held = 0
    for path in paths:
        with Image.open(path) as header:
            pixels = header.width * header.height
        if groups[-1] and held + pixels > HELD_PIXELS:
            groups.append([])
            held = 0
        groups[-1].append(path)
        held += pixels
    return groups


def median_seconds(call: Callable[[], Any], device: str) -> float:
    """Median time of a call, the first one left out by the caller."""
    import torch

    spent = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def _status(field: str) -> int | None:
    """A size in bytes from Linux' account of this process; None elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def memory_now() -> int | None:
    """Resident memory of this process in bytes, None where it is not known."""
    return _status("VmRSS")


def peak_memory() -> int | None:
    """The most resident memory that this process has had, in bytes; None where it is not known."""
    return _status("VmHWM")


def main() -> None:
    """Reads the request, writes tensors and measurements."""
    from safetensors.torch import save_file

    tensors, measured = run(json.loads(Path(sys.argv[1]).read_text()))
    save_file(tensors, sys.argv[2], metadata={"measured": json.dumps(measured)})


if __name__ == "__main__":
    main()
