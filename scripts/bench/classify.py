"""From JPEG files to labels, against the bare image tower: is anything but the tower's arithmetic waited for?

Base-patch16-224 with random weights, 200 labels and 64 JPEGs of 640x427, by `classify_files` with an optimized model.
The bare tower gets ready pixels in batches of the same size. Target: at least 90% of its speed, the labels known (they
are encoded once; the table has the first call too). Then what a JPEG decoded at half or quarter size (`draft`) would
save, and how far it moves the embeddings of the embedded checkpoint.

    python scripts/bench/classify.py
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

import siglip_hf
from common import machine, seconds, to_jpeg
from pipeline import build
from siglip_hf.inference.classify import classify_files


def make_picture(seed: int, size: tuple[int, int] = (640, 427)) -> Image.Image:
    """Noise of many scales, with a spectrum like a photograph's."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for octave in range(8):
        side = 2 ** (octave + 1)
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=float) * 0.6**octave
    total = (total - total.min()) / (total.max() - total.min()) * 255
    return Image.fromarray(total.astype(np.uint8)).filter(ImageFilter.SHARPEN)


def end_to_end(options: argparse.Namespace) -> None:
    """Prints pictures per second of the bare tower and of classifying files."""
    labels = [f"thing number {number}" for number in range(options.labels)]
    with tempfile.TemporaryDirectory() as folder:
        _, classifier = build(folder, torch.float32, "cpu")
        siglip_hf.optimize(classifier.model)
        files = []
        for number in range(options.pictures):
            files.append(str(Path(folder, f"{number}.jpg")))
            make_picture(number).save(files[-1], quality=90)
        pixels = torch.randn(options.pictures, 3, 224, 224).to(classifier.model.dtype)

        def bare_tower() -> None:
            with torch.inference_mode():
                for batch in pixels.split(options.batch_size):
                    classifier.model.encode_image(batch)

        def classify() -> None:
            classify_files(classifier, files, labels, batch_size=options.batch_size)

        bare_tower()
        first = seconds(classify)
        times: dict[str, list[float]] = {"tower": [], "classify": []}
        for _ in range(options.rounds):
            times["tower"].append(seconds(bare_tower))
            times["classify"].append(seconds(classify))
    tower, known = (statistics.median(values) for values in times.values())
    table = Table(
        f"{options.labels} labels, {options.pictures} JPEGs, {classifier.model.dtype}", "s", "images/s", "share"
    )
    for name, spent in (("bare tower", tower), ("files, labels known", known), ("files, first call", first)):
        table.add_row(name, f"{spent:.2f}", f"{options.pictures / spent:.1f}", f"{tower / spent:.0%}")
    Console(width=100).print(table)


def effect_of_draft(count: int) -> None:
    """Prints time and cosine of JPEGs decoded in less detail."""
    model = siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint(), dtype=torch.float32).eval()
    processor = siglip_hf.SiglipProcessor.from_pretrained(siglip_hf.default_checkpoint())
    files = []
    for number in range(count):
        files.append(to_jpeg(make_picture(number)))

    def decode(data: bytes, least: int | None) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        if least is not None:
            image.draft("RGB", (least, least))
        return image.convert("RGB")

    @torch.inference_mode()
    def embed(pictures: list[Image.Image]) -> torch.Tensor:
        return model.encode_image(processor(images=pictures, return_tensors="pt")["pixel_values"])

    whole = embed([decode(file, None) for file in files])
    side = model.config.vision_config.image_size
    table = Table(f"JPEG 640x427 to {side}x{side}", "ms to decode", "mean cosine", "least cosine")
    kinds = {"whole": None} | {f"draft, at least {times} times the size": times * side for times in (4, 2, 1)}
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    for file in files:  # the kinds in turn
        for name, least in kinds.items():
            spent[name].append(seconds(lambda least=least, file=file: decode(file, least)))
    for name, least in kinds.items():
        pictures = [decode(file, least) for file in files]
        cosines = (embed(pictures) * whole).sum(dim=-1)
        size = "x".join(map(str, pictures[0].size))
        milliseconds = statistics.median(spent[name]) * 1000
        table.add_row(f"{name}: {size}", f"{milliseconds:.2f}", f"{cosines.mean():.5f}", f"{cosines.min():.5f}")
    Console(width=100).print(table)


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft-only", action="store_true")
    options = parser.parse_args()
    print(machine("cpu"))
    effect_of_draft(options.pictures)
    if not options.draft_only:
        end_to_end(options)


if __name__ == "__main__":
    main()
