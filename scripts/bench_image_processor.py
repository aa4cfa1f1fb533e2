"""Image processors side by side: stock's Pillow one, hf-processors-rs, ours on Pillow, ours on torch.

Targets for ours on torch: at least 3x stock and 1.5x hf-processors-rs from PIL images, 2x stock and more than
hf-processors-rs from JPEG bytes.

Pictures of 640 x 427 pixels (the usual COCO size) to a float32 tensor, from PIL images and from JPEG bytes. Each round
runs all of them, one after the other, so that the machine's moods hit all alike; the numbers are medians.
hf-processors-rs (from the extra `bench`) is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from PIL import __version__ as pillow_version
from rich.console import Console
from rich.table import Table
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglip_hf import SiglipImageProcessor, SiglipImageProcessorFast

OURS = "siglip_hf (torch)"


def cpu_name() -> str:
    """The CPU's model as Linux knows it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_pictures(count: int, width: int, height: int) -> list[Image.Image]:
    """Blurred noise: as detailed as a photograph, so that the JPEG decoder has its usual work."""
    rng = np.random.default_rng(0)
    noise = (Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count))
    return [image.filter(ImageFilter.GaussianBlur(1.5)) for image in noise]


def to_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def medians(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; the first two rounds only warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=16, help="pictures per call")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224, help="side of the result")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=427)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pictures = make_pictures(options.batch, options.width, options.height)
    files = [to_jpeg(picture) for picture in pictures]
    size = {"height": options.size, "width": options.size}
    stock, slow, fast = (
        processor_class(size=size)
        for processor_class in (SiglipImageProcessorPil, SiglipImageProcessor, SiglipImageProcessorFast)
    )
    reference = stock(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(slow(pictures, return_tensors="pt")["pixel_values"], reference)

    def with_stock(sources: list[Any]) -> Any:
        # Stock reads no bytes; this is what its users write.
        opened = [Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source for source in sources]
        return stock(opened, return_tensors="pt")["pixel_values"]

    contestants: dict[str, Callable[[list[Any]], Any]] = {"transformers (Pillow)": with_stock}
    if importlib.util.find_spec("hf_processors_rs"):
        os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # read when the first batch comes
        import hf_processors_rs

        with tempfile.TemporaryDirectory() as folder:
            stock.save_pretrained(folder)
            for backend in ("pil", "torchvision"):
                contestants[f"hf-processors-rs ({backend})"] = hf_processors_rs.AutoImageProcessor.from_pretrained(
                    folder, backend=backend
                )
    contestants["siglip_hf (Pillow)"] = lambda sources: slow(sources, return_tensors="pt")["pixel_values"]
    contestants[OURS] = lambda sources: fast(sources, return_tensors="pt")["pixel_values"]

    print(f"{cpu_name()}, {options.threads} thread(s), torch {torch.__version__}, Pillow {pillow_version}")
    table = Table(
        *("", "PIL, ms", "over ours", "JPEG, ms", "over ours", "differs by"),
        title=f"{options.batch} pictures of {options.width} x {options.height} to {options.size}; ms per picture",
    )
    from_pil, from_jpeg = (
        medians({name: functools.partial(run, sources) for name, run in contestants.items()}, options.rounds)
        for sources in (pictures, files)
    )
    for name, run in contestants.items():
        cells = []
        for times in (from_pil, from_jpeg):
            cells += [f"{times[name] / options.batch * 1000:.2f}", f"{times[name] / times[OURS]:.2f}x"]
        levels = (torch.as_tensor(run(pictures)) - reference).abs().max().item() * 127.5
        table.add_row(name, *cells, f"{levels:.0f} of 255")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
