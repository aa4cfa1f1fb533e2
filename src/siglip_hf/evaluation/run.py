"""A model measured on a source of pictures: zero-shot accuracy of its labels, retrieval recall of its captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from siglip_hf.data.sources import Record, Source
from siglip_hf.evaluation.retrieval import RetrievalRecall, retrieval_recall
from siglip_hf.evaluation.zero_shot import ZeroShotAccuracy, name_classes, zero_shot_accuracy
from siglip_hf.inference.classify import truth_of
from siglip_hf.inference.label_bank import LabelBank
from siglip_hf.inference.label_store import LabelStore
from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
from siglip_hf.preprocessing.image_intake import PictureError

if TYPE_CHECKING:
    from PIL import Image

    from siglip_hf.data.embedder import SiglipEmbedder

#: Task -> the part of a record that it needs beside the picture.
TASKS = {"classify": "label", "retrieve": "captions"}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        pictures: how many were read, each file once.
        zero_shot: accuracy of the labels, or None if that was not asked for.
        retrieval: recall of the captions, or None.
        skipped: pictures that cannot be read and why, a line each.
        unused: entries without what the task needs and why, a line each.
    """

    pictures: int
    zero_shot: ZeroShotAccuracy | None = None
    retrieval: RetrievalRecall | None = None
    skipped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found: dict[str, Any] = {"pictures": self.pictures}
        if self.zero_shot is not None:
            found["zero_shot"] = self.zero_shot.as_dict()
        if self.retrieval is not None:
            sizes = {"images": self.retrieval.images, "texts": self.retrieval.texts}
            found["retrieval"] = {**sizes, **self.retrieval.as_dict()}
        return {**found, "skipped": self.skipped, "unused": self.unused}


def with_truth(source: Source, truth: Mapping[str, str]) -> Source:
    """The source with labels from a table of file names.

    Args:
        source: pictures; labels that they have already are replaced.
        truth: label by path or file name, as `read_truth_file` gives it. A picture that is not in it has no label.
    """
    return Source(source.name, [replace(record, label=truth_of(record.id, truth)) for record in source], source.unused)


def evaluate(
    embedder: SiglipEmbedder,
    source: Source,
    *,
    task: str = "auto",
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    labels: Sequence[str] | None = None,
    numbered: bool = False,
    ks: Sequence[int] = (1, 5, 10),
    label_bank: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluation:
    """Measures a model on labelled or captioned pictures.

    A picture that several rows name is read once; their labels and captions all count.

    Args:
        embedder: a SigLIP or NaFlex checkpoint, with its batch size and threads.
        source: pictures with labels, captions or both, as `open_source` reads them.
        task: "classify" (labels), "retrieve" (captions), or "auto": whatever the source has.
        templates: texts with `{}` for the label, averaged.
        labels: the candidates. By default the labels of the source, underscores read as spaces. See `name_classes`.
        numbered: the source has the numbers of `labels`, counted from 0.
        ks: the k of recall at k.
        label_bank: a folder in which the embeddings of labels are kept, for later runs.
        on_progress: called with what is being embedded, how many are done, and how many there are.

    Returns:
        The measures, and what was left out.

    Raises:
        ValueError: if the source has nothing to compare with, or no picture can be read.
    """
    used, tasks = _choose(source, task, several=labels is not None)
    names: Sequence[str] = ()
    classes: torch.Tensor | None = None
    number_of: dict[str, int] = {}
    if "classify" in tasks:
        names, number_of = name_classes(used.classes(), labels, numbered)
        if len(names) < 2:
            raise ValueError(f"{source.name} has one class only, {names[0]!r}; give more candidates as labels.")
        classes = _embed_labels(embedder, names, templates, label_bank, on_progress)

    # What a picture is compared with, by the number of the picture; each pair once, however many rows have it. A text
    # that one row has twice counts twice, as in the published benchmarks.
    pictures: dict[Any, int] = {}
    records: list[Record] = []
    of_class: dict[tuple[int, int], None] = {}
    of_caption: dict[tuple[int, str, int], None] = {}
    for record in used:
        number = pictures.setdefault(record.image, len(pictures))
        if number == len(records):
            records.append(record)
        if classes is not None and record.label:
            of_class[number, number_of[record.label]] = None
        if "retrieve" in tasks:
            nth: Counter[str] = Counter()
            for caption in record.captions:
                of_caption[number, caption, nth[caption]] = None
                nth[caption] += 1

    images, rows, skipped = _embed_pictures(embedder, records, on_progress)
    zero_shot = retrieval = None
    if classes is not None and (pairs := [(rows[i], c) for i, c in of_class if i in rows]):
        which, truth = (list(column) for column in zip(*pairs, strict=True))
        zero_shot = zero_shot_accuracy(images[which], classes, truth, names)
    if captioned := [(rows[i], caption) for i, caption, _ in of_caption if i in rows]:
        texts = _embed_captions(embedder, [caption for _, caption in captioned], on_progress)
        # Only pictures of a caption are searched: others may be there for their label alone.
        place = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in captioned))}
        owner = torch.tensor([place[row] for row, _ in captioned], device=images.device)
        retrieval = retrieval_recall(images[list(place)], texts, owner, ks)
    return Evaluation(len(rows), zero_shot, retrieval, skipped, used.unused)


def _choose(source: Source, task: str, several: bool) -> tuple[Source, list[str]]:
    """The records to use and the tasks they are for."""
    if task not in ("auto", *TASKS):
        raise ValueError(f"task={task!r} is unknown; pass auto, {' or '.join(TASKS)}.")
    pictured = source.require("image")
    if task != "auto":
        return pictured.require(TASKS[task]), [task]
    tasks = [task for task, part in TASKS.items() if any(getattr(record, part) for record in pictured)]
    # One folder around all pictures is no class to choose.
    if "retrieve" in tasks and "classify" in tasks and not several and len(pictured.classes()) < 2:
        tasks.remove("classify")
    if not tasks:
        raise ValueError(
            f"{source.name}: none of {len(source)} pictures has a label or a caption to compare it with. Put each "
            "class into a folder of its own, give a table with a column of labels or captions, or give the right "
            'labels in a JSON file, {"cat.png": "cat"} (--truth on the command line).'
        )
    if len(tasks) == 1:
        return pictured.require(TASKS[tasks[0]]), tasks
    kept = [record for record in pictured if record.label or record.captions]
    bare = [f"{record.id}: no label and no captions" for record in pictured if not record.label and not record.captions]
    return Source(source.name, kept, [*pictured.unused, *bare]), tasks


def _embed_labels(
    embedder: SiglipEmbedder,
    names: Sequence[str],
    templates: Sequence[str],
    label_bank: str | os.PathLike[str] | None,
    on_progress: Callable[[str, int, int], None],
) -> torch.Tensor:
    """(C, E) on the embedder's device, a group of labels at a time so that progress shows."""
    bank = LabelBank(
        embedder.model,
        embedder.processor.tokenizer,
        device=embedder.device,
        max_bytes=0,
        chunk_size=embedder.batch_size,
        store=None if label_bank is None else LabelStore(label_bank),
    )
    group = max(1, embedder.batch_size // len(templates))

    def encode(labels: Sequence[str]) -> torch.Tensor:
        return bank.class_embeddings(labels, templates)

    return _each_once(names, group, encode, lambda done, total: on_progress("labels", done, total))


def _embed_captions(
    embedder: SiglipEmbedder, captions: Sequence[str], on_progress: Callable[[str, int, int], None]
) -> torch.Tensor:
    """(T, E) on the embedder's device."""

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(embedder.encode_texts(texts)).to(embedder.device)

    return _each_once(captions, embedder.batch_size, encode, lambda done, total: on_progress("captions", done, total))


def _each_once(
    texts: Sequence[str],
    group: int,
    encode: Callable[[Sequence[str]], torch.Tensor],
    on_progress: Callable[[int, int], None],
) -> torch.Tensor:
    """A row for each text; a text that occurs several times is encoded once."""
    row = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row)
    parts = []
    for start in range(0, len(distinct), group):
        parts.append(encode(distinct[start : start + group]))
        on_progress(min(start + group, len(distinct)), len(distinct))
    return torch.cat(parts)[[row[text] for text in texts]]


def _embed_pictures(
    embedder: SiglipEmbedder, records: Sequence[Record], on_progress: Callable[[str, int, int], None]
) -> tuple[torch.Tensor, dict[int, int], list[str]]:
    """Embeddings (n, E) on the embedder's device, the row of each record that has one, and why the others have none."""

    def read(chunk: Sequence[Record], outcomes: list[str | None]) -> Iterator[Image.Image]:
        for record in chunk:
            try:
                picture = record.load_picture(embedder.draft_to)
            except PictureError as error:
                outcomes.append(f"{record.id}: {error.reason}")
            else:
                outcomes.append(None)
                yield picture
                del picture  # or it would lie in memory beside the next one

    def prepare(chunk: Sequence[Record]) -> tuple[list[str | None], dict[str, torch.Tensor] | None]:
        outcomes: list[str | None] = []
        inputs = embedder.prepare_images(read(chunk, outcomes))
        return outcomes, inputs

    parts: list[torch.Tensor] = []
    outcomes: list[str | None] = []  # of each record: what is wrong with it, or None
    for results, embeds in embedder.encode_ahead(records, prepare):
        outcomes += [outcome for chunk in results for outcome in chunk]
        parts.append(torch.from_numpy(embeds).to(embedder.device))
        on_progress("pictures", len(outcomes), len(records))
    wrong = [outcome for outcome in outcomes if outcome is not None]
    if len(wrong) == len(records):
        raise ValueError(f"none of {len(records)} pictures can be read; the first: {wrong[0]}")
    whole = [number for number, outcome in enumerate(outcomes) if outcome is None]
    return torch.cat(parts), {number: row for row, number in enumerate(whole)}, wrong
