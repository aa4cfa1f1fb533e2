"""Measure the embedded checkpoint on art styles it has never seen, against the targets set for it.

Usage: python scripts/checkpoints/evaluate_default.py [--model FOLDER] [--data data/pictures] [--json FILE]

Each style held out of training (build_pictures.py) is measured by itself. "Seen" concepts were drawn by other
hands in training; of "unseen" ones no picture was, only their names and tags as words. Pictures and texts go through
the package's own processor. A class is the mean embedding of its label in all templates of a language, or, in the full
ensemble, of its English label in all templates, its English aliases and its labels in nine other languages. The
10-way figures are means over 20 draws of 9 other concepts of the same kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import siglip_hf
from recipe.captions import TEMPLATES
from recipe.pictures import on_background, read_concepts, read_pictures, read_styles
from sketches import EACH, THINGS, sketch

LANGUAGES = ("ko", "ja", "de", "zh")
DRAWS = 20
DEMO = Path(siglip_hf.__file__).parent / "apps" / "pictures"
DEMO_TEMPLATE = "This is a photo of {}."  # the pipeline's own
# Name of the measure -> style -> target, in percent.
TARGETS = {
    "10-way, seen concepts": {"fxemoji": 97.5, "openmoji": 95.0},
    "10-way, unseen concepts": {"fxemoji": 65.0, "openmoji": 65.0},
    "top-1 of all plain concepts": {"fxemoji": 65.0, "openmoji": 52.0},
    "demo, 24 labels at once": {"fxemoji": 95.0},
    "sketches, 12 labels at once": {"pen": 60.0},
    "median score of the right label": {"fxemoji": 50.0, "openmoji": 50.0},
}
MEGABYTES = 40  # of both checkpoint folders together


def on_white(pixels: Tensor) -> list[Image.Image]:
    """Premultiplied RGBA (N, 4, S, S) uint8 as pictures on white."""
    rgb = on_background(pixels.float() / 255, torch.ones(len(pixels), 3))
    return [Image.fromarray(array) for array in (rgb * 255).round().byte().permute(0, 2, 3, 1).numpy()]


class Evaluator:
    """A model of either kind with its processor, and the concepts.

    Args:
        folder: Checkpoint folder.
        concepts: As `read_concepts` gives them.
    """

    def __init__(self, folder: str, concepts: list[dict[str, Any]]) -> None:
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.concepts = concepts

    @torch.inference_mode()
    def embed_pictures(self, images: list[Image.Image], **options: Any) -> Tensor:
        """Unit embeddings (N, E) of pictures; `options` are the processor's."""
        parts = []
        for start in range(0, len(images), 128):
            inputs = self.processor(images=images[start : start + 128], return_tensors="pt", **options)
            parts.append(self.model.encode_image(**inputs))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_classes(self, prompts_of: Callable[[dict[str, Any]], list[str]]) -> Tensor:
        """One unit embedding (C, E) per concept: the mean over its prompts."""
        prompts = [prompts_of(concept) for concept in self.concepts]
        flat = [prompt for group in prompts for prompt in group]
        parts = []
        for start in range(0, len(flat), 512):
            ids = self.processor(text=flat[start : start + 512], return_tensors="pt")["input_ids"]
            parts.append(self.model.encode_text(ids))
        groups = torch.cat(parts).split([len(group) for group in prompts])
        return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


def bare(concept: dict[str, Any]) -> list[str]:
    """The English label alone."""
    return [concept["label"]]


def in_language(language: str) -> Callable[[dict[str, Any]], list[str]]:
    """The label of one language in that language's templates."""
    return lambda concept: [t.format(concept["captions"][language]["label"]) for t in TEMPLATES[language]]


def full(concept: dict[str, Any]) -> list[str]:
    """The English label in all templates, its aliases, and the labels of all other languages."""
    others = [caption["label"] for language, caption in concept["captions"].items() if language != "en"]
    return [*in_language("en")(concept), *concept["aliases"], *others]


def ten_way(images: Tensor, classes: Tensor, concept: Tensor, pool: Tensor) -> float:
    """Percent of pictures whose own class beats 9 others drawn from `pool`.

    Args:
        images: (N, E).
        classes: (C, E).
        concept: (N,) class of each picture; only those in the pool are counted.
        pool: (K,) distinct classes.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.isin(concept, pool)
    images, concept = images[chosen], concept[chosen]
    scores = images @ classes.T  # (N, C)
    own = scores.gather(1, concept[:, None])
    right = 0.0
    for _ in range(DRAWS):
        order = torch.rand(len(images), len(pool), generator=generator)
        order[pool == concept[:, None]] = -1.0
        others = pool[order.topk(9, dim=1).indices]  # (N, 9)
        right += (own > scores.gather(1, others)).all(1).float().mean().item()
    return 100 * right / DRAWS


def top_1(images: Tensor, classes: Tensor, concept: Tensor, pool: Tensor) -> float:
    """Percent of pictures whose own class is the best of all in `pool`; pictures of other classes are not counted."""
    chosen = torch.isin(concept, pool)
    found = pool[(images[chosen] @ classes[pool].T).argmax(1)]
    return 100 * (found == concept[chosen]).float().mean().item()


def probabilities(model: torch.nn.Module, images: Tensor, classes: Tensor, concept: Tensor) -> tuple[float, float]:
    """Median sigmoid score, in percent, of the right label and of a wrong one."""
    logits = images @ classes.T * model.logit_scale.exp() + model.logit_bias
    right = logits.gather(1, concept[:, None]).sigmoid().median().item()
    wrong = logits[:, ::7].flatten()[::5].sigmoid().median().item()
    return 100 * right, 100 * wrong


def reliability(
    model: torch.nn.Module, images: Tensor, classes: Tensor, concept: Tensor, bins: int = 10
) -> list[tuple[float, float]]:
    """Mean score and share of right labels, in percent, of each tenth of the scores from 0 to 1.

    Each picture gives the score of its right label and that of one other, so that half of all are right.
    """
    other = torch.randint(1, len(classes), (len(concept),), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([concept, (concept + other) % len(classes)])
    cosines = (images.repeat(2, 1) * classes[labels]).sum(1)
    scores = (cosines * model.logit_scale.exp() + model.logit_bias).sigmoid()  # (2 N,)
    right = torch.arange(len(scores)) < len(concept)
    place = (scores * bins).long().clamp(max=bins - 1)
    groups = [place == number for number in range(bins)]
    return [
        (round(100 * scores[group].mean().item(), 2), round(100 * right[group].float().mean().item(), 2))
        for group in groups
        if group.sum() >= 20  # fewer say nothing
    ]


def evaluate(evaluator: Evaluator, data: Path) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """All measures, style -> name -> percent; and the reliability of the scores of each style."""
    concepts = evaluator.concepts
    train = torch.tensor([concept["split"] == "train" for concept in concepts])
    plain = torch.tensor([concept["plain"] for concept in concepts])
    seen, unseen, all_plain = (mask.nonzero()[:, 0] for mask in (train, ~train, plain))
    classes = {"full": evaluator.embed_classes(full), "bare": evaluator.embed_classes(bare)}
    for language in ("en", *LANGUAGES):
        classes[language] = evaluator.embed_classes(in_language(language))
    results, reliabilities = {}, {}
    for style in read_styles(data, "evaluate"):
        pictures, _ = read_pictures(data, [style], concepts)
        images, concept = evaluator.embed_pictures(on_white(pictures.pixels[:])), pictures.concept
        result = {
            "10-way, seen concepts": ten_way(images, classes["full"], concept, seen),
            "10-way, unseen concepts": ten_way(images, classes["full"], concept, unseen),
            "top-1 of all plain concepts": top_1(images, classes["full"], concept, all_plain),
            "top-1, seen plain concepts only": top_1(
                images[train[concept]], classes["full"], concept[train[concept]], all_plain
            ),
            "10-way, seen, bare English label": ten_way(images, classes["bare"], concept, seen),
            "10-way, unseen, bare English label": ten_way(images, classes["bare"], concept, unseen),
            "top-1, bare English label": top_1(images, classes["bare"], concept, all_plain),
        }
        for language in ("en", *LANGUAGES):
            result[f"10-way, seen, {language} label"] = ten_way(images, classes[language], concept, seen)
        right, wrong = probabilities(evaluator.model, images, classes["bare"], concept)
        result |= {"median score of the right label": right, "median score of a wrong label": wrong}
        results[style] = result
        reliabilities[style] = reliability(evaluator.model, images, classes["bare"], concept)
    results.setdefault("fxemoji", {})["demo, 24 labels at once"] = demo(evaluator)
    results["pen"] = {"sketches, 12 labels at once": sketches(evaluator)}
    rounded = {style: {name: round(value, 2) for name, value in result.items()} for style, result in results.items()}
    return rounded, reliabilities


def demo(evaluator: Evaluator) -> float:
    """Percent of the demo's pictures, on white, that get their own label of all the demo's."""
    labels = json.loads((DEMO / "labels.json").read_text(encoding="utf-8"))
    images = []
    for name in labels:
        with Image.open(DEMO / name) as image:
            drawing = image.convert("RGBA")
        images.append(Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB"))
    names = list(labels.values())
    return named(evaluator, images, names, {name: DEMO_TEMPLATE.format(name) for name in names})


def sketches(evaluator: Evaluator) -> float:
    """Percent of scripted pen drawings that get their own name of the twelve."""
    names = [thing for thing in THINGS for _ in range(EACH)]
    images = [sketch(thing, number) for thing in THINGS for number in range(EACH)]
    return named(evaluator, images, names, {thing: thing for thing in THINGS})


def named(evaluator: Evaluator, images: list[Image.Image], names: list[str], prompts: dict[str, str]) -> float:
    """Percent of `images` whose best prompt is that of their own name.

    Args:
        evaluator: The model.
        images: (N) pictures.
        names: (N) right labels.
        prompts: Label -> text, of all labels to choose from.
    """
    labels = list(prompts)
    with torch.inference_mode():
        ids = evaluator.processor(text=list(prompts.values()), return_tensors="pt")["input_ids"]
        best = (evaluator.embed_pictures(images) @ evaluator.model.encode_text(ids).T).argmax(1).tolist()
    return 100 * sum(labels[number] == name for number, name in zip(best, names, strict=True)) / len(names)


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Show each measure with its target, if it has one."""
    table = Table("percent", *results)
    for name in dict.fromkeys(name for result in results.values() for name in result):
        cells = []
        for style, result in results.items():
            cell = "" if name not in result else f"{result[name]:.2f}" if result[name] < 1 else f"{result[name]:.1f}"
            target = TARGETS.get(name, {}).get(style)
            cells.append(cell if target is None else f"{cell} (>= {target:g})")
        table.add_row(name, *cells)
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    folder = arguments.model or siglip_hf.default_checkpoint()
    try:
        evaluator = Evaluator(folder, read_concepts(arguments.data))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results, reliabilities = evaluate(evaluator, arguments.data)
    print_table(results)
    megabytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
    print(f"checkpoint folder: {megabytes:.1f} MB (target for both checkpoints together: {MEGABYTES})")
    if arguments.json:
        figures: dict[str, Any] = {"megabytes": round(megabytes, 2), **results}
        for style, points in reliabilities.items():
            figures[style]["reliability"] = points
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
