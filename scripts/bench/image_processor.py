"""Image processors side by side: stock's Pillow one, hf-processors-rs, ours on Pillow, ours on torch.

Targets for ours on torch: at least 3x stock and 1.5x hf-processors-rs from PIL images, 2x stock and more than
hf-processors-rs from JPEG bytes.

Pictures of 640 x 427 pixels (the usual COCO size) to a float32 tensor, from PIL images and from JPEG bytes. Each round
runs all of them, one after the other, so that the machine's moods hit all alike; the numbers are medians.
hf-processors-rs (from the extra `bench`) is left out where it is not installed.

`--antialias` measures instead how far torch's resize without antialiasing, as some programs prepare pictures, is from
Pillow's, on the package's own pictures of 160 x 160.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import siglip_hf
from common import in_turn, machine, noise_picture, to_jpeg
from siglip_hf import SiglipImageProcessor, SiglipImageProcessorFast
from siglip_hf.preprocessing.image_intake import load_picture

OURS = "siglip_hf (torch)"
PICTURES = Path(siglip_hf.__file__).parent / "apps" / "pictures"


def resize_differences(filter_name: str, size: int) -> list[np.ndarray]:
    """For each picture, |Pillow - torch without antialiasing| after a resize to `size`, in levels of 255."""
    differences = []
    for path in sorted(PICTURES.glob("*.png")):
        picture = load_picture(path)
        pillow = np.asarray(picture.resize((size, size), Image.Resampling[filter_name.upper()]), np.float32)
        channels_first = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
        resized = torch.nn.functional.interpolate(channels_first, (size, size), mode=filter_name, align_corners=False)
        differences.append(np.abs(pillow - resized[0].permute(1, 2, 0).round().clamp(0, 255).numpy()))
    return differences


def print_resize_differences() -> None:
    """The table of `--antialias`."""
    print(machine(packages=("torch", "pillow")))
    table = Table("filter", "160 to", "largest", "mean of a picture", title="with and without antialiasing, of 255")
    for filter_name in ("bicubic", "bilinear"):
        for size in (112, 384):
            found = resize_differences(filter_name, size)
            means = [float(difference.mean()) for difference in found]
            largest = max(float(difference.max()) for difference in found)
            table.add_row(filter_name, f"{size}", f"{largest:.0f}", f"{min(means):.2f} to {max(means):.2f}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=16, help="pictures per call")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224, help="side of the result")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=427)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--antialias", action="store_true", help="only: what antialiasing changes")
    options = parser.parse_args()
    if options.antialias:
        print_resize_differences()
        return
    torch.set_num_threads(options.threads)

    rng = np.random.default_rng(0)
    pictures = [noise_picture(rng, options.width, options.height) for _ in range(options.batch)]
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

    print(machine(packages=("torch", "transformers", "pillow", "hf-processors-rs")))
    table = Table(
        *("", "PIL, ms", "over ours", "JPEG, ms", "over ours", "differs by"),
        title=f"{options.batch} pictures of {options.width} x {options.height} to {options.size}; ms per picture",
    )
    from_pil, from_jpeg = (
        in_turn({name: functools.partial(run, sources) for name, run in contestants.items()}, options.rounds, warm_up=2)
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
