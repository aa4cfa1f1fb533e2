"""Measure the embedded NaFlex checkpoint on pictures of several shapes, beside the square one, which squashes them.

Usage: python scripts/checkpoints/evaluate_naflex.py [--model FOLDER] [--square FOLDER] [--data FOLDER] [--json FILE]

The pictures are those of FxEmoji, an art style held out of training, as they are and on white canvases two and four
times as wide or as tall; and two of them side by side. A class is the mean embedding of its English label in all
templates and of its English aliases. The measures are those of evaluate_default.py; of two pictures side by
side, the part of the two labels that is among the best ten of all plain concepts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

import siglip_hf
from evaluate_default import Evaluator, in_language, on_white, ten_way, top_1
from recipe.pictures import read_concepts, read_pictures

STYLE = "fxemoji"
#: Name -> how many times as wide and as tall as the picture the canvas is.
SHAPES = {"square": (1, 1), "2:1": (2, 1), "4:1": (4, 1), "1:2": (1, 2), "1:4": (1, 4)}
BUDGETS = (16, 36, 64)


def english(concept: dict[str, Any]) -> list[str]:
    """The English label in all templates, and the aliases."""
    return [*in_language("en")(concept), *concept["aliases"]]


def on_canvas(image: Image.Image, wide: int, tall: int) -> Image.Image:
    """The picture in the middle of a white canvas, `wide` and `tall` times its size."""
    width, height = image.size
    canvas = Image.new("RGB", (wide * width, tall * height), "white")
    canvas.paste(image, ((wide - 1) * width // 2, (tall - 1) * height // 2))
    return canvas


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one size in one."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def both_found(images: Tensor, classes: Tensor, concepts: Tensor, pool: Tensor) -> float:
    """Percent of the two right classes `concepts` (N, 2) that are among the best ten of `pool`; all are in it."""
    best = pool[(images @ classes[pool].T).topk(10, dim=1).indices]  # (N, 10)
    return 100 * (best[:, :, None] == concepts[:, None]).any(1).float().mean().item()


def evaluate(folder: str, data: Path, budgets: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """All measures: "budget, shape" -> name -> percent. Without budgets the model is a square one."""
    concepts = read_concepts(data)
    evaluator = Evaluator(folder, concepts)
    pictures, _ = read_pictures(data, [STYLE], concepts)
    images, concept = on_white(pictures.pixels[:]), pictures.concept
    seen = torch.tensor([entry["split"] == "train" for entry in concepts]).nonzero()[:, 0]
    plain = torch.tensor([entry["plain"] for entry in concepts]).nonzero()[:, 0]
    classes = evaluator.embed_classes(english)
    usable = (torch.isin(concept, plain) & torch.isin(concept, seen)).nonzero()[:, 0]
    usable = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))]
    left, right = usable[: len(usable) // 2], usable[len(usable) // 2 :][: len(usable) // 2]
    pairs = [side_by_side(images[i], images[j]) for i, j in zip(left.tolist(), right.tolist(), strict=True)]
    results = {}
    for budget in budgets or (None,):
        options = {} if budget is None else {"max_num_patches": budget}
        name = "squashed" if budget is None else f"{budget} patches"
        for shape, (wide, tall) in SHAPES.items():
            embeds = evaluator.embed_pictures([on_canvas(image, wide, tall) for image in images], **options)
            results[f"{name}, {shape}"] = {
                "10-way, seen concepts": ten_way(embeds, classes, concept, seen),
                "top-1 of all plain concepts": top_1(embeds, classes, concept, plain),
            }
        found = both_found(
            evaluator.embed_pictures(pairs, **options), classes, torch.stack([concept[left], concept[right]], 1), plain
        )
        results[f"{name}, two side by side"] = {"labels among the best 10": found}
    return {name: {key: round(value, 1) for key, value in result.items()} for name, result in results.items()}


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """One row per model, budget and shape."""
    table = Table("model", "pictures", "10-way, seen", "top-1, plain", "both in top 10")
    for model, rows in results.items():
        for name, row in rows.items():
            values = (
                row.get(key, "")
                for key in ("10-way, seen concepts", "top-1 of all plain concepts", "labels among the best 10")
            )
            table.add_row(model, name, *map(str, values))
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=siglip_hf.naflex_checkpoint(), help="NaFlex checkpoint (the embedded one)")
    parser.add_argument("--square", default=siglip_hf.default_checkpoint(), help="square one (the embedded one)")
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    try:
        results = {
            "square": evaluate(arguments.square, arguments.data, ()),
            "NaFlex": evaluate(arguments.model, arguments.data, BUDGETS),
        }
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
