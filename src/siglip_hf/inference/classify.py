"""Labels for many picture files, zero-shot or learned: scores them in batches, and goes on past the broken ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siglip_hf.files import parse_json, read_text, text_lines
from siglip_hf.inference.learned import HeadClassifier
from siglip_hf.inference.optimize.optimization import optimize
from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline
from siglip_hf.loading import load_checkpoint, pick_device
from siglip_hf.parallel import prefetch
from siglip_hf.preprocessing.image_intake import PictureError

_READERS = 4  # threads that read and decode pictures while the towers compute


@dataclass
class Classified:
    """What became of one picture.

    Attributes:
        source: its path or URL.
        labels: dicts, best first, with `label`, `cosine`, `logit`, `sigmoid` and `softmax`, or with `label` and
            `probability` of learned classes; empty if it is broken.
        error: what is wrong with it, or None.
        truth: its right label, if that is known.
        unknown: whether it is like none of the learned classes; None for zero-shot labels.
        similarity: its cosine with the nearest learned class.
    """

    source: str
    labels: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    truth: str | None = None
    unknown: bool | None = None
    similarity: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something, for JSON."""
        return {name: value for name, value in vars(self).items() if value not in (None, [])}


def _reason(error: Exception) -> str:
    """What went wrong, without the path again."""
    return getattr(error, "strerror", None) or str(error)


def read_labels_file(path: str | Path) -> list[str]:
    """Labels from a text file, one on each line; empty lines are skipped.

    Raises:
        ValueError: if the file cannot be read as text, holds no label, or is JSON.
    """
    if Path(path).suffix.lower() == ".json":
        raise ValueError(
            f"the labels file {str(path)!r} should be plain text with a label on each line; JSON of right labels by "
            "file name goes to --truth, and then no other labels are needed."
        )
    try:
        lines = text_lines(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"the labels file {str(path)!r} cannot be read: {_reason(error)}") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise ValueError(f"the labels file {str(path)!r} holds no label; write one on each line.")
    return labels


def read_truth_file(path: str | Path) -> dict[str, str]:
    """Right labels by file name, from a JSON object such as `{"cat.png": "a cat"}`.

    Raises:
        ValueError: if the file cannot be read as such.
    """
    try:
        truth = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"the file of right labels {str(path)!r} cannot be read: {_reason(error)}") from error
    if not isinstance(truth, dict) or not truth or not all(isinstance(label, str) for label in truth.values()):
        raise ValueError(f"{str(path)!r} must hold a JSON object of file names and labels, like {{'a.png': 'a cat'}}.")
    return truth


def load_classifier(
    model: str | None = None,
    device: str | None = None,
    fast: bool = False,
    label_bank: str | os.PathLike[str] | None = None,
) -> SiglipZeroShotImageClassificationPipeline:
    """The zero-shot pipeline of a SigLIP checkpoint.

    Args:
        model: name or folder of the checkpoint; the embedded one if None.
        device: where it computes; the first accelerator by default.
        fast: on a CPU, make it faster (`siglip_hf.optimize`), which rounds the scores to the dtype that it picks.
        label_bank: a folder in which the embeddings of labels are kept, for later runs.

    Raises:
        ValueError: if there is no such device or checkpoint, or it is not a SigLIP that this package serves.
    """
    where = pick_device(device)
    loaded, processor = load_checkpoint(model)
    classifier = SiglipZeroShotImageClassificationPipeline(
        task="zero-shot-image-classification",
        model=loaded,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        device=where,
        label_bank=label_bank,
    )
    if fast:
        optimize(classifier.model)
    return classifier


def classify_files(
    classifier: SiglipZeroShotImageClassificationPipeline,
    sources: Sequence[str],
    labels: Iterable[str] | str,
    *,
    templates: Sequence[str] | None = None,
    top_k: int | None = None,
    truth: Mapping[str, str] | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Classified]:
    """Scores pictures against labels. A picture that cannot be read costs only itself.

    Args:
        classifier: the pipeline, or what prepares pictures and answers as it does.
        sources: paths and URLs.
        labels: as the pipeline takes them.
        templates: texts with `{}` for the label, averaged; the pipeline's default if None or empty.
        top_k: only the best so many labels of each picture.
        truth: right labels, by path or by file name.
        batch_size: pictures read and scored together.
        on_progress: called with the number of pictures just done.

    Returns:
        One entry per source, in their order.

    Raises:
        ValueError: for labels, templates or numbers that cannot be.
    """
    # Without a picture it only checks, so that a mistake is known before the first file is read.
    options = {"hypothesis_template": list(templates) if templates else None, "named_scores": True, "top_k": top_k}
    classifier([], labels, **options)

    def score(pictures: list[Any]) -> list[dict[str, Any]]:
        scored = classifier(pictures, labels, batch_size=batch_size, **options)
        return [
            {"labels": [{name: value for name, value in row.items() if name != "score"} for row in rows]}
            for rows in scored
        ]

    return _in_batches(sources, classifier.preprocess, score, truth, batch_size, on_progress)


def classify_with_head(
    head: HeadClassifier,
    sources: Sequence[str],
    *,
    top_k: int | None = None,
    truth: Mapping[str, str] | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Classified]:
    """Says which of its learned classes a head sees in pictures. A picture that cannot be read costs only itself.

    Args:
        head: as `load_head` gives it.
        sources: paths and URLs.
        top_k: only the best so many classes of each picture.
        truth: right labels, by path or by file name.
        batch_size: pictures read and scored together.
        on_progress: called with the number of pictures just done.

    Returns:
        One entry per source, in their order.
    """
    return _in_batches(
        sources, head.prepare, lambda pictures: head.score(pictures, top_k), truth, batch_size, on_progress
    )


def _in_batches(
    sources: Sequence[str],
    prepare: Callable[[str], Any],
    score: Callable[[list[Any]], list[dict[str, Any]]],
    truth: Mapping[str, str] | None,
    batch_size: int,
    on_progress: Callable[[int], None],
) -> list[Classified]:
    """An entry per source, with the fields that `score` gives each picture that `prepare` could read."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    entries = [Classified(source, truth=truth_of(source, truth)) for source in sources]

    def read(entry: Classified) -> Any:
        try:
            return prepare(entry.source)
        except PictureError as error:
            entry.error = error.reason
            return None

    # Read and made small ahead, so that the towers do not wait for files and decoders.
    pictures = prefetch(entries, read, workers=min(batch_size, _READERS), depth=2 * batch_size)
    for start in range(0, len(entries), batch_size):
        batch = entries[start : start + batch_size]
        whole = [(entry, picture) for entry, picture in zip(batch, pictures, strict=False) if picture is not None]
        for (entry, _), fields in zip(whole, score([picture for _, picture in whole]), strict=True):
            vars(entry).update(fields)
        on_progress(len(batch))
    return entries


def truth_of(source: str, truth: Mapping[str, str] | None) -> str | None:
    """The right label of a picture, or None.

    Args:
        source: its path, URL or name.
        truth: right labels by such a source or by file name alone.
    """
    truth = truth or {}
    return truth.get(source, truth.get(os.path.basename(source)))


def accuracy(results: Iterable[Classified]) -> tuple[int, int]:
    """How many best labels are right, and of how many pictures with a known label."""
    judged = [result for result in results if result.truth is not None and result.labels]
    return sum(result.labels[0]["label"] == result.truth for result in judged), len(judged)
