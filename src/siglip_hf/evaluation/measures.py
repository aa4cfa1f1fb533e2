"""How well a model tells pictures and texts apart: zero-shot accuracy, and recall of retrieval in both directions.

Measures as in the SigLIP paper (arXiv:2303.15343, section 4), computed in blocks so that memory follows the number of
pictures plus texts, never their product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from siglip_hf.data.sources import Record, Source
from siglip_hf.inference.classify import truth_of
from siglip_hf.inference.label_bank import LabelBank
from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
from siglip_hf.preprocessing.image_intake import PictureError

if TYPE_CHECKING:
    from PIL import Image

    from siglip_hf.data.embedder import SiglipEmbedder

#: Task -> the part of a record that it needs beside the picture.
TASKS = {"classify": "label", "retrieve": "captions"}

# Cosines that differ by less are equal: about what rounding does to a float32 product of unit vectors.
TIE_TOLERANCE = 1e-6
_CHUNK_SIZE = 2048


@dataclass(frozen=True)
class RetrievalRecall:
    """Share of queries with a right answer among their best k, for each k.

    Attributes:
        image_to_text: by k, over the images that have a text.
        text_to_image: by k, over the texts.
        images: number of images searched.
        texts: number of texts searched.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int
    texts: int

    def as_dict(self) -> dict[str, float]:
        """Flat names and numbers, such as `image_to_text_recall_at_1`, for logs and JSON."""
        directions = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return {f"{name}_recall_at_{k}": value for name, recall in directions.items() for k, value in recall.items()}


@torch.no_grad()
def retrieval_recall(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_text: torch.Tensor | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk_size: int = _CHUNK_SIZE,
) -> RetrievalRecall:
    """Recall at k both ways, with any number of texts per image.

    A text is a hit at k if its image is among the k images most similar to it; an image, if any of its texts is among
    the k texts most similar to it. Where wrong answers are as similar as the right one (cosines within
    `TIE_TOLERANCE`), the hit is the probability that a random order of these equals brings up a right one: a model
    whose embeddings are all alike scores chance, not everything or nothing.

    Args:
        image_embeds: (I, E), floating point, any length: cosines are compared.
        text_embeds: (T, E), on the same device.
        image_of_text: (T,) row of `image_embeds` that each text belongs to. Images without a text are found wrongly,
            but not asked for.
        ks: how many answers count.
        chunk_size: images and texts per block; memory is that of the embeddings and a block of chunk_size^2 numbers.

    Raises:
        ValueError: for shapes, indices or numbers that cannot be, and embeddings that are not finite.
    """
    images, texts = _checked_units(image_embeds, "image_embeds"), _checked_units(text_embeds, "text_embeds")
    if images.shape[1] != texts.shape[1] or images.device != texts.device:
        raise ValueError(
            f"image_embeds {tuple(images.shape)} on {images.device} and text_embeds {tuple(texts.shape)} on "
            f"{texts.device} cannot be compared; both must have the same width and device."
        )
    owner = torch.as_tensor(image_of_text, device=images.device)  # (T,)
    if owner.shape != texts.shape[:1] or owner.is_floating_point():
        raise ValueError(
            f"image_of_text must hold {len(texts)} whole numbers, one for each text, not {owner.dtype} of shape "
            f"{tuple(owner.shape)}."
        )
    if owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(f"image_of_text goes from {owner.min()} to {owner.max()}, but there are {len(images)} images.")
    if chunk_size < 1 or not ks or min(ks) < 1:
        raise ValueError(f"chunk_size={chunk_size} and every k of ks={tuple(ks)} must be at least 1.")
    owner = owner.long()

    of_text = torch.cat(  # (T,) cosine of each text with its image
        [
            (part * images[rows]).sum(dim=1)
            for part, rows in zip(texts.split(chunk_size), owner.split(chunk_size), strict=True)
        ]
    )
    of_image = torch.full_like(images[:, 0], -torch.inf)  # (I,) the best cosine of each image with one of its texts
    of_image.scatter_reduce_(0, owner, of_text, "amax")
    by_text, by_image = _Rivals(of_text), _Rivals(of_image)
    by_text.equal_right += 1
    by_image.equal_right.index_add_(0, owner, (of_text >= of_image[owner] - TIE_TOLERANCE).long())

    for top in range(0, len(images), chunk_size):
        rows = slice(top, min(top + chunk_size, len(images)))
        numbers = torch.arange(rows.start, rows.stop, device=owner.device)
        for left in range(0, len(texts), chunk_size):
            columns = slice(left, left + chunk_size)
            cosines = images[rows] @ texts[columns].T  # (i, t)
            cosines[numbers[:, None] == owner[columns]] = -torch.inf  # what is left is wrong
            by_image.count(cosines, rows)
            by_text.count(cosines.T, columns)

    asked = torch.isfinite(of_image).cpu()
    return RetrievalRecall(
        image_to_text={k: by_image.hits(k)[asked].mean().item() for k in ks},
        text_to_image={k: by_text.hits(k).mean().item() for k in ks},
        images=len(images),
        texts=len(texts),
    )


def _checked_units(embeds: torch.Tensor, name: str) -> torch.Tensor:
    if embeds.ndim != 2 or not len(embeds) or not embeds.is_floating_point():
        raise ValueError(
            f"{name} must be a matrix of embeddings, a row each, not {embeds.dtype} of shape {tuple(embeds.shape)}."
        )
    units = nn.functional.normalize(embeds.float(), dim=1)
    if not torch.isfinite(units).all():
        # A NaN compares as neither better nor worse and would count as found.
        raise ValueError(f"{name} holds NaN or infinity; the model that made it has diverged or overflowed.")
    return units


class _Rivals:
    """For each of N queries: how many wrong answers are better than its best right one, and how many are equal."""

    def __init__(self, right: torch.Tensor) -> None:
        self.right = right  # (N,) the best right cosine
        self.better = torch.zeros_like(right, dtype=torch.long)
        self.equal_wrong = torch.zeros_like(self.better)
        self.equal_right = torch.zeros_like(self.better)

    def count(self, wrong: torch.Tensor, queries: slice) -> None:
        """Adds answers; `wrong` (queries, answers) holds their cosines, -inf for those that do not count."""
        right = self.right[queries, None]
        better = (wrong > right + TIE_TOLERANCE).sum(dim=1)
        self.better[queries] += better
        self.equal_wrong[queries] += (wrong >= right - TIE_TOLERANCE).sum(dim=1) - better

    def hits(self, k: int) -> torch.Tensor:
        """(N,) float64, the probability that the first k answers hold a right one."""
        better, equal_wrong, equal_right = (x.cpu() for x in (self.better, self.equal_wrong, self.equal_right))
        places = (k - better).clamp(min=0)  # left for the equals
        equals = (equal_wrong + equal_right).clamp(min=1)
        miss = torch.ones(len(better), dtype=torch.float64)
        for drawn in range(k):  # each place goes to one of the equals not yet drawn
            wrong_next = (equal_wrong - drawn).clamp(min=0).double() / (equals - drawn).clamp(min=1)
            miss *= torch.where(drawn < places, wrong_next, 1.0)
        return 1 - miss


@dataclass(frozen=True)
class ClassAccuracy:
    """What became of the pictures of one class.

    Attributes:
        label: its name.
        pictures: how many it has.
        right: how many of them were given this label.
        confused_with: the wrong label most often given to them, or None.
        confused: how often.
    """

    label: str
    pictures: int
    right: int
    confused_with: str | None
    confused: int

    @property
    def accuracy(self) -> float:
        """Share of its pictures that were given this label."""
        return self.right / self.pictures


@dataclass(frozen=True)
class ZeroShotAccuracy:
    """Which of C labels a model gave to each of N pictures.

    Attributes:
        labels: names of the classes, those without a picture as well.
        truth: (N,) number of the right class.
        predicted: (N, K) numbers of the best classes, best first.
    """

    labels: tuple[str, ...]
    truth: torch.Tensor
    predicted: torch.Tensor

    def top(self, k: int) -> float:
        """Share of pictures whose right label is among the best k.

        Args:
            k: at most the K that were kept, 5 or the number of labels.
        """
        return (self.predicted[:, :k] == self.truth[:, None]).any(dim=1).double().mean().item()

    def counts(self) -> Counter[tuple[int, int]]:
        """How often each (right class, given class) occurs; a confusion matrix without its zeros."""
        return Counter(zip(self.truth.tolist(), self.predicted[:, 0].tolist(), strict=True))

    def per_class(self) -> list[ClassAccuracy]:
        """The classes that have a picture, worst first."""
        pictures = Counter(self.truth.tolist())
        counts = self.counts()
        worst: dict[int, tuple[int, int]] = {}  # right class -> (how often, the wrong one); the first wins a draw
        for (right, given), count in sorted(counts.items()):
            if right != given and count > worst.get(right, (0, 0))[0]:
                worst[right] = (count, given)
        rows = []
        for number, total in sorted(pictures.items()):
            confused, other = worst.get(number, (0, -1))
            rows.append(
                ClassAccuracy(
                    self.labels[number],
                    total,
                    counts[number, number],
                    self.labels[other] if confused else None,
                    confused,
                )
            )
        return sorted(rows, key=lambda row: (row.accuracy, row.label))

    @property
    def mean_per_class(self) -> float:
        """Top-1 accuracy averaged over the classes that have a picture, large or small."""
        rows = self.per_class()
        return sum(row.accuracy for row in rows) / len(rows)

    def as_dict(self) -> dict[str, Any]:
        """Numbers for JSON. Top-5 is left out where there are no more than five labels."""
        wide = {"top_5": self.top(5)} if len(self.labels) > 5 else {}
        classes = [
            {
                "label": row.label,
                "pictures": row.pictures,
                "accuracy": row.accuracy,
                "confused_with": row.confused_with,
                "confused": row.confused,
            }
            for row in self.per_class()
        ]
        return {"top_1": self.top(1), **wide, "mean_per_class": self.mean_per_class, "classes": classes}


@torch.no_grad()
def zero_shot_accuracy(
    image_embeds: torch.Tensor,
    class_embeds: torch.Tensor,
    truth: torch.Tensor | Sequence[int],
    labels: Sequence[str],
    *,
    chunk_size: int = _CHUNK_SIZE,
) -> ZeroShotAccuracy:
    """Gives each picture the classes most similar to it. Which of two equal ones comes first is not defined.

    Args:
        image_embeds: (N, E), any length: cosines are compared.
        class_embeds: (C, E), on the same device, such as `LabelBank.class_embeddings` returns.
        truth: (N,) number of the right class of each picture.
        labels: C names.
        chunk_size: pictures per block; memory is that of the embeddings and a block of chunk_size x C numbers.

    Raises:
        ValueError: for embeddings that are no matrices or not finite, and fewer than two classes.
    """
    images, classes = _checked_units(image_embeds, "image_embeds"), _checked_units(class_embeds, "class_embeds")
    if len(classes) < 2 or len(classes) != len(labels):
        raise ValueError(f"{len(classes)} classes with {len(labels)} labels: there must be two or more, a label each.")
    right = torch.as_tensor(truth).cpu()
    if right.shape != images.shape[:1] or right.min() < 0 or right.max() >= len(classes):
        raise ValueError(f"truth must hold {len(images)} numbers of classes, from 0 to {len(classes) - 1}.")
    width = min(5, len(classes))
    best = [(part @ classes.T).topk(width, dim=1).indices.cpu() for part in images.split(chunk_size)]
    return ZeroShotAccuracy(tuple(labels), right, torch.cat(best))


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
    ks: Sequence[int] = (1, 5, 10),
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
        ks: the k of recall at k.
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
        names, number_of = name_classes(used.classes(), labels)
        if len(names) < 2:
            raise ValueError(f"{source.name} has one class only, {names[0]!r}; give more candidates as labels.")
        classes = _embed_labels(embedder, names, templates, on_progress)

    # What a picture is compared with, by the number of the picture; each pair once.
    pictures: dict[Any, int] = {}
    records: list[Record] = []
    of_class: dict[tuple[int, int], None] = {}
    of_caption: dict[tuple[int, str], None] = {}
    for record in used:
        number = pictures.setdefault(record.image, len(pictures))
        if number == len(records):
            records.append(record)
        if classes is not None and record.label:
            of_class[number, number_of[record.label]] = None
        if "retrieve" in tasks:
            of_caption.update(((number, caption), None) for caption in record.captions)

    images, rows, skipped = _embed_pictures(embedder, records, on_progress)
    zero_shot = retrieval = None
    if classes is not None and (pairs := [(rows[i], c) for i, c in of_class if i in rows]):
        which, truth = (list(column) for column in zip(*pairs, strict=True))
        zero_shot = zero_shot_accuracy(images[which], classes, truth, names)
    if captioned := [(rows[i], caption) for i, caption in of_caption if i in rows]:
        texts = _embed_captions(embedder, [caption for _, caption in captioned], on_progress)
        # Only pictures of a caption are searched: others may be there for their label alone.
        place = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in captioned))}
        owner = torch.tensor([place[row] for row, _ in captioned], device=images.device)
        retrieval = retrieval_recall(images[list(place)], texts, owner, ks)
    return Evaluation(len(rows), zero_shot, retrieval, skipped, used.unused)


def name_classes(found: Sequence[str], given: Sequence[str] | None = None) -> tuple[Sequence[str], dict[str, int]]:
    """Names of the classes that pictures are compared with, and the number among them of each label that was found.

    Without `given`, a label is its own name with underscores read as spaces. With it, these are the candidates, and a
    label is found among them, whatever its case, or is a number that counts them from 0; or, if not one is found and
    there are as many of both, the candidates name the labels in their sorted order (as ImageNet's folders are named).

    Args:
        found: labels of the source.
        given: candidates, in their order.

    Returns:
        C names, and for each label its number among them.

    Raises:
        ValueError: if labels are bare numbers without `given`, or not to be found in it.
    """
    readable = {label: " ".join(label.replace("_", " ").split()) for label in found}
    numeric = all(label.isdecimal() for label in found)
    if given is None:
        if numeric:
            raise ValueError(
                f"the labels are bare numbers ({', '.join(found[:3])}, ...); give their names, in that order, as "
                "labels (--labels-file)."
            )
        given = list(dict.fromkeys(readable.values()))
    place = {name.casefold(): number for number, name in reversed(list(enumerate(given)))}
    missing = [label for label in found if readable[label].casefold() not in place]
    if not missing:
        return given, {label: place[readable[label].casefold()] for label in found}
    if numeric and max(map(int, found)) < len(given):
        return given, {label: int(label) for label in found}
    if len(missing) == len(found) == len(given) and not numeric:
        return given, {label: number for number, label in enumerate(sorted(found))}
    raise ValueError(
        f"{len(missing)} of {len(found)} classes are not among the {len(given)} labels given, such as "
        f"{', '.join(map(repr, missing[:3]))}."
    )


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
            "class into a folder of its own, or give a table with a column of labels or captions."
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
    on_progress: Callable[[str, int, int], None],
) -> torch.Tensor:
    """(C, E) on the embedder's device, a group of labels at a time so that progress shows."""
    bank = LabelBank(
        embedder.model,
        embedder.processor.tokenizer,
        device=embedder.device,
        max_bytes=0,
        chunk_size=embedder.batch_size,
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
    """Embeddings (n, E) on the embedder's device, the row of each record that has one, and what ails the others."""

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
