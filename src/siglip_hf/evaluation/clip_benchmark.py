"""Folders of pictures as CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark) and its datasets on the hub have them.

FOLDER/classnames.txt                        a name on each line; the .cls of a sample counts them from 0
FOLDER/zeroshot_classification_templates.txt a text on each line, with {c} for the name
FOLDER/dataset_type.txt                      "retrieval" where samples have captions (.txt) in place of a class
FOLDER/test/nshards.txt                      how many shards there are
FOLDER/test/0.tar, 1.tar, ...                WebDataset shards
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from siglip_hf.data.sources import Source, open_source
from siglip_hf.evaluation.run import Evaluation
from siglip_hf.files import read_text, text_lines

_SHARDS = "nshards.txt"
_CLASSES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_TYPE = "dataset_type.txt"


@dataclass(frozen=True)
class Benchmark:
    """A folder that was opened; its fields are those of `evaluate`.

    Attributes:
        source: the samples of one split.
        task: "classify" or "retrieve".
        labels: names of the classes, by the number that the samples have; None if the folder does not tell.
        templates: texts with `{}` for the name; None if the folder does not tell.
    """

    source: Source
    task: str
    labels: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None


def is_benchmark(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has CLIP_benchmark's layout: a split in it has shards and their number."""
    path = Path(folder)
    return path.is_dir() and any(path.glob(f"*/{_SHARDS}"))


def open_benchmark(folder: str | os.PathLike[str], split: str = "test") -> Benchmark:
    """The samples of a split, with the classes and templates that belong to them.

    Args:
        folder: as described above.
        split: the folder of the shards.

    Raises:
        FileNotFoundError: for a shard that is missing.
        ValueError: for a split that is not there, a file that cannot be read, and samples with several classes each.
    """
    path = Path(folder)
    if not (path / split / _SHARDS).is_file():
        splits = sorted(file.parent.name for file in path.glob(f"*/{_SHARDS}"))
        raise ValueError(f"{path} has no split {split!r} with a file {_SHARDS}; it has {', '.join(splits) or 'none'}.")
    count = read_text(path / split / _SHARDS).strip()
    if not count.isdecimal() or not 0 < int(count) <= 1_000_000:
        raise ValueError(f"{path / split / _SHARDS} holds {count[:50]!r}; it should be the number of shards.")
    source = open_source([str(path / split / f"{number}.tar") for number in range(int(count))])
    source.name = f"{path} ({split})"
    kind = read_text(path / _TYPE).strip().lower() if (path / _TYPE).exists() else "classification"
    if kind == "retrieval":
        return Benchmark(source, "retrieve")
    if kind != "classification":
        raise ValueError(
            f"{path / _TYPE} says {kind[:50]!r}; classification and retrieval are measured, and no other kind."
        )
    labels, templates = _lines(path / _CLASSES), _lines(path / _TEMPLATES)
    texts = None if templates is None else tuple(text.replace("{c}", "{}") for text in templates)
    return Benchmark(source, "classify", labels, texts)


def as_clip_benchmark(found: Evaluation) -> dict[str, float]:
    """The numbers of an evaluation under the names that CLIP_benchmark gives them.

    acc5 is there from five classes on. Its "image retrieval" is a search for pictures with texts.
    """
    numbers: dict[str, float] = {}
    if (accuracy := found.zero_shot) is not None:
        wide = {"acc5": accuracy.top(5)} if len(accuracy.labels) >= 5 else {}
        numbers |= {"acc1": accuracy.top(1), **wide, "mean_per_class_recall": accuracy.mean_per_class}
    if found.retrieval is not None:
        numbers |= {f"image_retrieval_recall@{k}": value for k, value in found.retrieval.text_to_image.items()}
        numbers |= {f"text_retrieval_recall@{k}": value for k, value in found.retrieval.image_to_text.items()}
    return numbers


def _lines(path: Path) -> tuple[str, ...] | None:
    """The lines of a file that is not there in every folder.

    Raises:
        ValueError: for an empty line, after which all would be counted wrongly.
    """
    if not path.exists():
        return None
    lines = tuple(line.strip() for line in text_lines(read_text(path).strip()))
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is empty; each line should hold one text.")
    return lines
