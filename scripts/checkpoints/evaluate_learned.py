"""Measure `siglip_hf.learn` with the embedded checkpoint: ten pictures of each class, tried on all the others.

Usage: python scripts/checkpoints/evaluate_learned.py [--model FOLDER] [--data data/pictures] [--each 10]

Three sets: OpenMoji's drawings (a hand held out of the checkpoint's training; build_pictures.py fetched them) in the 24
largest kinds that Unicode sorts them into, flags left out; the pen drawings of sketches.py; and scikit-learn's digits.
Prints accuracy on the other pictures, beside the accuracy of the classes' names alone on the same ones, how sure the
classifier was, and what is called unknown when every second class has not been taught.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import siglip_hf
from evaluate_default import on_white
from siglip_hf.inference.classify import load_classifier
from sketches import EACH, THINGS, sketch

Pictures = dict[str, list[Image.Image]]
KINDS = 24
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def openmoji(data: Path) -> Pictures:
    """The largest kinds of emoji, in OpenMoji's hand; each in an order drawn by a fixed seed."""
    package = next((data / "npm").glob("emojibase-data@*"))
    emoji = json.loads(next(package.rglob("en/data.json")).read_text(encoding="utf-8"))
    names = json.loads(next(package.rglob("meta/groups.json")).read_text(encoding="utf-8"))["subgroups"]
    kind_of = {one["hexcode"].lower(): names[str(one["subgroup"])] for one in emoji if "subgroup" in one}
    rows = defaultdict(list)
    for row, code in enumerate(json.loads((data / "openmoji.json").read_text(encoding="utf-8"))):
        if "flag" not in kind_of.get(code, "flag"):
            rows[kind_of[code].replace("-", " ")].append(row)
    pixels = np.load(data / "openmoji.npy", mmap_mode="r")
    largest = sorted(rows, key=lambda kind: (-len(rows[kind]), kind))[:KINDS]
    shuffled = np.random.default_rng(0)
    return {kind: on_white(torch.from_numpy(pixels[shuffled.permutation(rows[kind])])) for kind in largest}


def digits() -> Pictures:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, black on white, enlarged."""
    from sklearn.datasets import load_digits

    found: Pictures = {name: [] for name in DIGITS}
    for values, number in zip(*load_digits(return_X_y=True), strict=True):
        picture = Image.fromarray((255 - values.reshape(8, 8) * 255 / 16).astype(np.uint8)).convert("RGB")
        found[DIGITS[number]].append(picture.resize((64, 64), Image.Resampling.BICUBIC))
    # In the order of the set the first ones are of one writer.
    shuffled = np.random.default_rng(0)
    return {name: [many[place] for place in shuffled.permutation(len(many))] for name, many in found.items()}


def share(values: Sequence[bool]) -> str:
    return f"{np.mean(values):.1%}"


def measure(pictures: Pictures, model: str | None, each: int) -> list[str]:
    """A row of the table."""
    truth = [name for name, many in pictures.items() for _ in many[each:]]
    others = [one for many in pictures.values() for one in many[each:]]
    with tempfile.TemporaryDirectory() as place:
        for name, many in pictures.items():
            (Path(place) / "all" / name).mkdir(parents=True)
            for number, picture in enumerate(many[:each]):
                picture.save(Path(place) / "all" / name / f"{number}.png")
        start = time.perf_counter()
        learned = siglip_hf.learn(Path(place) / "all", model=model)
        seconds = time.perf_counter() - start
        for name in list(pictures)[1::2]:
            (Path(place) / "all" / name).rename(Path(place) / name)
        half = siglip_hf.learn(Path(place) / "all", model=model)
    results = learned.classifier(others, top_k=1, batch_size=64)
    right = [result["labels"][0]["label"] == name for result, name in zip(results, truth, strict=True)]
    zero_shot = load_classifier(model)(others, list(pictures), batch_size=64, top_k=1)
    by_name = [rows[0]["label"] == name for rows, name in zip(zero_shot, truth, strict=True)]
    unknown = [result["unknown"] for result in half.classifier(others, top_k=1, batch_size=64)]
    taught = [name in half.classifier.labels for name in truth]
    return [
        f"{len(pictures)} x {each}",
        str(len(others)),
        share(by_name),
        share(right),
        f"{learned.accuracy:.1%}",
        f"{np.mean([result['labels'][0]['probability'] for result in results]):.1%}",
        share([one for one, known in zip(unknown, taught, strict=True) if known]),
        share([one for one, known in zip(unknown, taught, strict=True) if not known]),
        learned.method,
        f"{seconds:.1f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    parser.add_argument("--each", type=int, default=10, help="pictures of each class to learn from")
    arguments = parser.parse_args()
    sets = {
        "OpenMoji, kinds": openmoji(arguments.data),
        "pen drawings": {thing: [sketch(thing, number) for number in range(EACH)] for thing in THINGS},
        "digits": digits(),
    }
    columns = ("learned from", "tried on", "names alone", "learned", "cross-validated", "mean probability")
    table = Table("set", *columns, "unknown of taught", "unknown of untaught", "method", "time")
    for name, pictures in sets.items():
        table.add_row(name, *measure(pictures, arguments.model, arguments.each))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
