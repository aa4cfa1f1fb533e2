"""Zero-shot pipeline, ours against stock: many labels, a few pictures, at the shapes of base-patch16-224.

Random weights, the same in both. Stock means the classes of transformers by their own modules: model, slow tokenizer,
Pillow image processor and pipeline. Run: python scripts/bench/pipeline.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipModel as StockModel
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer as StockTokenizer
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline as StockPipeline

import siglip_hf
from common import SPIECE, machine

TASK = "zero-shot-image-classification"


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument(
        "--stock-pictures", type=int, default=2, help="measured with stock, then scaled; 0: all of them"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="pictures per forward, in both")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    stock_pictures = options.stock_pictures or options.pictures

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (427, 640, 3), dtype=np.uint8)) for _ in range(options.pictures)]
    labels = [f"thing number {i}" for i in range(options.labels)]
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = build(folder, dtype, options.device)

    def run(pipe: Any, count: int) -> list[Any]:
        return pipe(pictures[:count], candidate_labels=labels, batch_size=options.batch_size)

    for pipe in (stock, ours):
        pipe(pictures[0], candidate_labels=labels[:4])
    times: dict[str, list[float]] = {"stock": [], "first": [], "known": []}
    difference = 0.0
    for _ in range(options.rounds):
        ours.label_bank.clear()
        seconds, stock_results = timed(lambda: run(stock, stock_pictures), options.device)
        times["stock"].append(seconds * options.pictures / stock_pictures)
        seconds, results = timed(lambda: run(ours, options.pictures), options.device)
        times["first"].append(seconds)
        times["known"].append(timed(lambda: run(ours, options.pictures), options.device)[0])
        difference = max(difference, largest_difference(stock_results, results))
    medians = {name: statistics.median(values) for name, values in times.items()}

    print(f"machine: {machine(options.device)}")
    print(
        f"{options.labels} labels, {options.pictures} pictures of 640x427, base-patch16-224, {options.dtype}, "
        f"batch size {options.batch_size}, median of {options.rounds}"
    )
    scaled = f" (scaled from {stock_pictures} pictures)" if stock_pictures != options.pictures else ""
    print(f"largest relative difference of scores: {difference:.1e}")
    print(f"stock:               {medians['stock']:8.2f} s{scaled}")
    print(f"ours, first call:    {medians['first']:8.2f} s")
    print(f"ours, labels known:  {medians['known']:8.2f} s")
    print(f"ratio, labels known: {medians['stock'] / medians['known']:8.1f}x")
    print(f"ratio, first call:   {medians['stock'] / medians['first']:8.1f}x")


def build(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Both pipelines on the same random weights of base size."""
    torch.manual_seed(0)
    tokenizer = StockTokenizer(str(SPIECE), model_max_length=64)
    # The size of the vocabulary costs memory, not time.
    siglip_hf.SiglipModel(siglip_hf.SiglipConfig(text_config={"vocab_size": len(tokenizer)})).save_pretrained(folder)
    # Each class of ours saves what its stock namesake reads.
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil().save_pretrained(folder)
    stock = StockPipeline(
        model=StockModel.from_pretrained(folder, dtype=dtype).eval(),
        # As the published checkpoints have it; without it stock would mask the padding.
        tokenizer=StockTokenizer.from_pretrained(folder, model_input_names=["input_ids"]),
        image_processor=SiglipImageProcessorPil.from_pretrained(folder),
        task=TASK,
        device=device,
    )
    return stock, transformers.pipeline(TASK, model=folder, dtype=dtype, device=device)


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and what it returns."""
    start = time.perf_counter()
    result = function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def largest_difference(one: list[Any], other: list[Any]) -> float:
    """Largest relative difference between the scores of the pictures that both have."""
    worst = 0.0
    for left, right in zip(one, other, strict=False):
        scores = {result["label"]: result["score"] for result in right}
        worst = max(worst, *(abs(result["score"] / scores[result["label"]] - 1) for result in left))
    return worst


if __name__ == "__main__":
    main()
