"""Whether `siglip-hf index` and `search` find the right picture for 20 stated queries, with the embedded checkpoint.

    python scripts/checkpoints/evaluate_search.py                       # the demo's 24 pictures
    python scripts/checkpoints/evaluate_search.py --data data/pictures  # and all pictures of build_pictures.py

Recall@k: the share of the queries with a right picture among the first k. In the built pictures an answer is right if
the name of the thing has the query's noun in it as a word, such as "cat face" for "a cat"; they are all of a style, the
one that no training picture was in by default.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from siglip_hf.cli.main import main as siglip_hf

#: What is asked, and the noun that a right answer is named by. The nouns are the first twenty of the demo's labels.
QUERIES = {
    "a cat": "cat",
    "a dog": "dog",
    "a tiger": "tiger",
    "a penguin": "penguin",
    "a turtle": "turtle",
    "a frog": "frog",
    "an octopus": "octopus",
    "a whale": "whale",
    "a pizza": "pizza",
    "a hamburger": "hamburger",
    "a banana": "banana",
    "a strawberry": "strawberry",
    "a watermelon": "watermelon",
    "a doughnut": "doughnut",
    "a rocket": "rocket",
    "a bicycle": "bicycle",
    "a helicopter": "helicopter",
    "a sailboat": "sailboat",
    "a guitar": "guitar",
    "an umbrella": "umbrella",
}
DEMO = Path(__file__).parents[2] / "src" / "siglip_hf" / "apps" / "pictures"
DEPTHS = (1, 3, 10)


def index_and_search(pictures: Path, work: Path) -> dict[str, list[str]]:
    """Runs both commands on a folder; the names of the first answers to each query."""
    (work / "queries.txt").write_text("\n".join(QUERIES), encoding="utf-8")
    for line in (
        ["index", str(pictures), "--out", str(work / "idx")],
        ["search", str(work / "idx"), "--queries", str(work / "queries.txt"), "-k", str(max(DEPTHS)), "--json"],
    ):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = siglip_hf(line)
        if code:
            raise SystemExit(f"siglip-hf {' '.join(line)} ended with {code}")
    answers = json.loads(printed.getvalue())
    return {query: [hit["id"] for hit in answer["hits"]] for query, answer in zip(QUERIES, answers, strict=True)}


def recall(answers: dict[str, list[str]], is_right: Callable[[str, str], bool]) -> dict[int, float]:
    """Share of the queries with a right answer among the first k, by k."""
    right = {query: [is_right(name, QUERIES[query]) for name in names] for query, names in answers.items()}
    return {k: sum(any(marks[:k]) for marks in right.values()) / len(right) for k in DEPTHS}


def demo_recall(work: Path) -> dict[int, float]:
    """Recall on the demo's pictures, by their right labels."""
    labels = json.loads((DEMO / "labels.json").read_text(encoding="utf-8"))
    return recall(index_and_search(DEMO, work), lambda name, noun: labels[name] == noun)


def built_recall(data: Path, style: str, work: Path) -> tuple[dict[int, float], int]:
    """Recall on all pictures of a style that `build_pictures.py` has made, and how many these are."""
    concepts = {one["code"]: one["label"] for one in json.loads((data / "concepts.json").read_text(encoding="utf-8"))}
    codes = json.loads((data / f"{style}.json").read_text(encoding="utf-8"))
    pixels = np.load(data / f"{style}.npy", mmap_mode="r")  # (N, 4, 72, 72)
    (work / "pictures").mkdir()
    for number, (code, picture) in enumerate(zip(codes, pixels, strict=True)):
        on_white = picture[:3] + (255 - picture[3])  # colours are premultiplied with alpha
        Image.fromarray(np.ascontiguousarray(np.moveaxis(on_white, 0, -1))).save(
            work / "pictures" / f"{number:04d} {code}.png"
        )

    def is_right(name: str, noun: str) -> bool:
        label = concepts.get(Path(name).stem.split(" ")[1], "")
        return noun in label.replace("-", " ").lower().split()

    return recall(index_and_search(work / "pictures", work), is_right), len(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that build_pictures.py has filled")
    parser.add_argument("--style", default="fxemoji")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_recall("the demo's 24 pictures", demo_recall(Path(folder)))
    if options.data is not None:
        with tempfile.TemporaryDirectory() as folder:
            found, count = built_recall(options.data, options.style, Path(folder))
        print_recall(f"{count} pictures of {options.style}", found)


def print_recall(name: str, values: dict[int, float]) -> None:
    print(f"{name}: " + ", ".join(f"recall@{k} {value:.0%}" for k, value in values.items()))


if __name__ == "__main__":
    main()
