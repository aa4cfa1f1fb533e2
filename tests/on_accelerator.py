"""Runs what is to go on beside an accelerator on one made of CPU memory, and tells what the host did meanwhile.

A script, because the made-up device lasts as long as the process. It prints one line of JSON for each path: facts that
the tests of each room assert; see the fixture `on_accelerator`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

import accelerator
import siglip_hf
from siglip_hf import parallel

DEVICE = "gpu:0"
PATHS: dict[str, Callable[[], Any]] = {}


def path(function: Callable[[], Any]) -> Callable[[], Any]:
    """Runs a function, and tells what it returns, by its name."""
    PATHS[function.__name__] = function
    return function


def done(notes: list[accelerator.Note]) -> dict[str, Any]:
    """What the host did, in numbers."""
    of = {kind: [note for note in notes if note.kind == kind] for kind in ("send", "fetch", "launch", "read", "wait")}
    return {
        **{f"{kind}s": len(found) for kind, found in of.items()},
        "sent_bytes": sum(note.bytes for note in of["send"]),
        "pinned": all(note.pinned for note in of["send"]),
        "blocking": sum(note.blocks for note in notes),
    }


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Image processors

SIZES = [(40, 60), (33, 20), (64, 64), (16, 90)]
PICTURES = [Image.fromarray(noise(*size)) for size in SIZES]
BY_CHANNEL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
RAW = {"do_rescale": False, "do_normalize": False}
UNIT = noise(30, 30).astype(np.float64) / 255  # stays in 0..1 where nothing is rescaled


def preprocessed(processor: Any, pictures: Any, **options: Any) -> dict[str, Any]:
    """One batch on the device, against the same on the CPU."""
    with accelerator.Accelerator() as device:
        there = processor(pictures, device=DEVICE, **options)
        notes = list(device.notes)
        kept = list(there["pixel_values"])
        values = [each.cpu() for each in kept]
    here = processor(pictures, **options)
    return {
        **done(notes),
        "device": sorted({str(each.device) for each in kept}),
        "dtype": sorted({str(each.dtype) for each in kept}),
        "contiguous": all(each.is_contiguous() for each in kept),
        "equal": all(
            torch.equal(one, other) and one.dtype == other.dtype
            for one, other in zip(values, here["pixel_values"], strict=True)
        ),
        "others": {
            name: [there[name].device.type, torch.equal(there[name], here[name])]
            for name in here
            if name != "pixel_values"
        },
    }


@path
def image_processors() -> dict[str, Any]:
    fast = siglip_hf.SiglipImageProcessorFast(size={"height": 16, "width": 24})
    naflex = siglip_hf.Siglip2ImageProcessorFast(patch_size=8, max_num_patches=20)
    pt = {"return_tensors": "pt"}
    return {
        "plain": preprocessed(fast, PICTURES, **pt),
        "by channel": preprocessed(fast, PICTURES, **pt, **BY_CHANNEL),
        "raw": preprocessed(fast, PICTURES, **pt, **RAW),
        "floats": preprocessed(fast, [*PICTURES, UNIT], **pt, do_rescale=False),
        "sizes": preprocessed(fast, PICTURES, do_resize=False),
        "sizes and padding": preprocessed(
            fast, PICTURES, **pt, do_resize=False, do_pad=True, pad_size={"height": 90, "width": 90}
        ),
        "naflex": preprocessed(naflex, PICTURES, **pt),
        "naflex by channel": preprocessed(naflex, PICTURES, **pt, **BY_CHANNEL),
        "naflex raw": preprocessed(naflex, PICTURES, **pt, **RAW),
        "naflex floats": preprocessed(naflex, [*PICTURES, UNIT], **pt, do_rescale=False),
        "naflex budgets": preprocessed(naflex, PICTURES, **pt, max_num_patches=[4, 20, 9, 16]),
    }


def main() -> None:
    """Runs every path."""
    accelerator.install()
    parallel._PINNED.add(accelerator.NAME)
    for name, function in PATHS.items():
        try:
            told = function()
        except Exception:  # told in the line, and fails the tests of this path
            told = {"error": traceback.format_exc()}
        print(json.dumps({"path": name, "told": told}))


if __name__ == "__main__":
    sys.exit(main())
