"""Bulk embedding of JPEG files against the bare tower, in the same run: how much do reading and writing cost?

Both the embedded checkpoint and base-patch16-224 (random weights). The bound is the slower of the tower alone and the
decoding alone. Where both run on the same cores (no GPU), what can be reached at best is less: the time of a picture is
then the sum of both. Run: python scripts/bench/embed.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import siglip_hf
from common import SPIECE, machine
from siglip_hf.data.embed import embed_items, embed_source, items_of
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.sources import open_source


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000, help="for the embedded checkpoint")
    parser.add_argument("--base-pictures", type=int, default=128, help="for base shapes; 0: leave them out")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 240), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", help="float32, bfloat16; as `siglip-hf embed` by default")
    parser.add_argument("--device", help="as `siglip-hf embed` by default")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--no-fast", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = {"device": options.device, "dtype": options.dtype, "fast": not options.no_fast, "workers": options.workers}
    load["batch_size"] = options.batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = max(options.pictures, options.base_pictures)
        file_bytes = write_photos(folder / "all", count, tuple(options.size))
        print(f"JPEG files of {options.size[0]}x{options.size[1]}, {file_bytes / 1000:.0f} kB on average")
        jobs = [("embedded checkpoint", siglip_hf.default_checkpoint(), options.pictures)]
        if options.base_pictures:
            jobs.append(("base-patch16-224", write_base(folder / "base"), options.base_pictures))
        for title, model, pictures in jobs:
            measure(title, model, sorted((folder / "all").iterdir())[:pictures], folder, options.rounds, load)


def measure(title: str, model: str, files: list[Path], folder: Path, rounds: int, load: dict) -> None:
    """Measures one model and prints its rates, medians of some rounds that take turns."""
    photos = folder / f"photos-{len(files)}"
    photos.mkdir(exist_ok=True)
    for file in files:
        (photos / file.name).unlink(missing_ok=True)
        (photos / file.name).hardlink_to(file)
    embedder = SiglipEmbedder(model, **load)
    items = items_of(open_source(photos), "image")
    size = embedder.batch_size
    batch = embedder.prepare_images(item.read(embedder.draft_to)[1] for item in items[:size])
    encode = embedder.encode_images
    nothing = np.empty((size, embedder.dimension), np.float32)
    encode(batch)
    rates: dict[str, list[float]] = {"tower": [], "decode": [], "embed": []}
    for number in range(rounds):
        start = time.perf_counter()
        for _ in range(-(-len(items) // size)):
            encode(batch)
        rates["tower"].append(-(-len(items) // size) * size / (time.perf_counter() - start))

        embedder.encode_images = lambda inputs: nothing
        start = time.perf_counter()
        for _ in embed_items(embedder, items):
            pass
        rates["decode"].append(len(items) / (time.perf_counter() - start))
        del embedder.encode_images

        result = embed_source(photos, folder / f"{title}-{number}", model=model, **load)
        assert result.done == len(items)
        rates["embed"].append(result.done / result.seconds)
    tower, decode, embed = (statistics.median(rates[name]) for name in ("tower", "decode", "embed"))
    print(f"\n{title}: {len(items)} pictures, batches of {size}, {str(embedder.dtype).removeprefix('torch.')}")
    print(f"machine: {machine(str(embedder.device))}, {embedder.workers} threads that decode")
    print(f"tower alone:      {tower:8.1f} pictures/s")
    print(f"decoding alone:   {decode:8.1f} pictures/s")
    print(f"siglip-hf embed:  {embed:8.1f} pictures/s")
    slower = "tower" if tower < decode else "decoding"
    print(f"of the slower, {slower}: {embed / min(tower, decode):8.1%}")
    print(f"of the tower alone:    {embed / tower:8.1%}")
    if embedder.device.type == "cpu":
        shared = 1 / (1 / tower + 1 / decode)
        print(f"bound of shared cores: {shared:8.1f} pictures/s, of which {embed / shared:.1%} are reached")


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> float:
    """Smooth noise with grain, as JPEG files of quality 90; returns their mean size in bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    total = 0
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-6, 7, (*pixels.shape[:2], 1), dtype=np.int16)
        file = folder / f"{number:05d}.jpg"
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
        total += file.stat().st_size
    return total / count


def write_base(folder: Path, text_layers: int = 1) -> str:
    """A checkpoint of base-patch16-224 with random weights; where the text tower is not used, one block does."""
    torch.manual_seed(0)
    tokenizer = siglip_hf.SiglipTokenizerFast(str(SPIECE), model_max_length=64)
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": text_layers}
    siglip_hf.SiglipModel(siglip_hf.SiglipConfig(text_config=text)).save_pretrained(folder)
    siglip_hf.SiglipProcessor(siglip_hf.SiglipImageProcessor(), tokenizer).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
