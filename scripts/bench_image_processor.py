"""Image processors side by side: stock's Pillow one, ours on Pillow, ours on torch. Target: the last at least 2x stock.

Pictures of 640 x 427 pixels (the usual COCO size) to a float32 tensor, from PIL images and from JPEG bytes. Each round
runs all of them, one after the other, so that the machine's moods hit all alike; the numbers are medians.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from PIL import __version__ as pillow_version
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglip_hf import SiglipImageProcessor, SiglipImageProcessorFast


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
    error = (fast(pictures, return_tensors="pt")["pixel_values"] - reference).abs()

    print(f"{cpu_name()}, {options.threads} thread(s), torch {torch.__version__}, Pillow {pillow_version}")
    print(f"{options.batch} pictures of {options.width} x {options.height} to {options.size}; ms per picture")
    levels = error.max().item() * 127.5
    print(f"largest difference of the torch processor: {levels:.2f} of 255, mean {error.mean().item() * 127.5:.5f}")
    from_pil = medians(
        {
            "stock": lambda: stock(pictures, return_tensors="pt"),
            "slow": lambda: slow(pictures, return_tensors="pt"),
            "fast": lambda: fast(pictures, return_tensors="pt"),
        },
        options.rounds,
    )
    from_jpeg = medians(
        {
            # Stock reads no bytes; this is what its users write.
            "stock": lambda: stock([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt"),
            "slow": lambda: slow(files, return_tensors="pt"),
            "fast": lambda: fast(files, return_tensors="pt"),
        },
        options.rounds,
    )
    print(f"\n{'':12}{'stock (Pillow)':>16}{'ours (Pillow)':>16}{'ours (torch)':>16}{'ratio':>9}{'ratio':>9}")
    for name, times in (("from JPEG", from_jpeg), ("from PIL", from_pil)):
        columns = "".join(f"{times[key] / options.batch * 1000:16.2f}" for key in ("stock", "slow", "fast"))
        ratios = "".join(f"{times['stock'] / times[key]:8.1f}x" for key in ("slow", "fast"))
        print(f"{name:12}{columns}{ratios}")


if __name__ == "__main__":
    main()
