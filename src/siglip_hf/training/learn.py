"""`siglip_hf.learn`: classes of your own from a few pictures each. The tower stays as it is; a linear layer is fitted.

Pictures are embedded once, into a store that a second run brings up to date.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from siglip_hf.data.embed import embed_source
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.sources import Source, open_source
from siglip_hf.data.store import EmbeddingStore
from siglip_hf.evaluation.zero_shot import ZeroShotAccuracy
from siglip_hf.files import check_output_folder, new_folder
from siglip_hf.inference.label_bank import LabelBank
from siglip_hf.inference.learned import HeadClassifier
from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
from siglip_hf.loading import load_model
from siglip_hf.models.learned_head import LearnedHead
from siglip_hf.models.modeling_siglip import SiglipForImageClassification
from siglip_hf.models.modeling_siglip2 import Siglip2ForImageClassification, Siglip2Model
from siglip_hf.training.few_shot import ZERO_SHOT, Candidate, FewShot, check_sklearn, fit_few_shot

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Learned:
    """What `learn` made, and what it can be expected to do.

    Attributes:
        classifier: says what new pictures show: `learned.classifier("new.png")`.
        pictures: how many were learned from.
        method: the kind of classifier that was best.
        accuracy: of that, on pictures that it had not been fitted to (cross-validation).
        zero_shot: accuracy of the classes' names alone on the same pictures.
        candidates: everything that was compared, best first.
        confusion: the class given to each picture that was compared, by classifiers that had not seen it.
        unknown_rate: share of pictures of the classes that are called unknown.
        unknown_found: share of pictures that are called unknown when their own class has not been taught.
        skipped: pictures that cannot be read and why, a line each.
        unused: entries without a picture or a class, a line each.
    """

    classifier: HeadClassifier
    pictures: int
    method: str
    accuracy: float
    zero_shot: float
    candidates: list[Candidate]
    confusion: ZeroShotAccuracy
    unknown_rate: float
    unknown_found: float
    skipped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        names = ("pictures", "method", "accuracy", "zero_shot", "unknown_rate", "unknown_found", "skipped", "unused")
        compared = [{"name": one.name, "accuracy": one.accuracy, "log_loss": one.log_loss} for one in self.candidates]
        numbers = {name: getattr(self, name) for name in names}
        return {"classes": self.classifier.labels, **numbers, "compared": compared, **_of_classes(self.confusion)}


def learn(
    data: str | os.PathLike[str] | Source | Dataset,
    out: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    folds: int = 5,
    unknown_rate: float = 0.05,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Learned:
    """Teaches a SigLIP classes of your own; ten pictures of each are enough to begin with.

    The nearest class mean, logistic regression, the zero-shot classifier and blends are compared by cross-validation,
    and the best is fitted to all pictures. Its probabilities are calibrated on pictures that it had not seen.

    Args:
        data: class folders, a table (CSV, JSONL, ...) with a column of labels, or whatever else `open_source` takes.
        out: folder to write: a checkpoint for `load_head`, for `siglip-hf classify --head`, for
            `pipeline("image-classification")` and for `SiglipForImageClassification.from_pretrained`. None: nothing
            is kept.
        model: folder or name of a checkpoint; the embedded one by default. NaFlex checkpoints too.
        embeddings: folder of the pictures' embeddings, made or brought up to date; by default `out` with ".emb" at
            its end.
        templates: texts with `{}` for the class, for the zero-shot classifier.
        folds: parts of the cross-validation.
        unknown_rate: share of pictures of the classes that may be called unknown, in 0..0.5; more finds more of those
            that are of none.
        image_column, label_column, split: as in `open_source`.
        batch_size: pictures in one forward.
        device, dtype: as in `SiglipEmbedder`.
        overwrite: replace a checkpoint that is in `out`.
        on_progress: called with what is being done, how much is done, and how much there is.

    Raises:
        ValueError: if there are fewer than two classes, a class has a single picture, or `out` is not empty.
    """
    if not 0 <= unknown_rate <= 0.5:
        raise ValueError(f"unknown_rate={unknown_rate} must lie in 0..0.5.")
    if folds < 2:
        raise ValueError(f"folds={folds} must be at least 2.")
    check_sklearn()
    if out is not None:
        check_output_folder(out, overwrite=overwrite, marker="config.json")
    if not isinstance(data, Source):
        data = open_source(data, image_column=image_column, label_column=label_column, split=split)
    source = data.require("image", "label", keep_broken=True)
    classes = source.classes()
    _check_classes(source, Counter(record.label for record in source if record.label))

    embedder = SiglipEmbedder(model, device=device, dtype=dtype, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as temporary:
        place = embeddings or (f"{os.fspath(out).rstrip('/')}.emb" if out is not None else Path(temporary) / "emb")
        embedded = embed_source(
            source,
            place,
            kind="image",
            embedder=embedder,
            on_progress=lambda done, total: on_progress("embedding pictures", done, total),
        )
        store = EmbeddingStore(embedded.path, embedded.manifest)
        ids, vectors = store.rows(["id"])["id"].to_pylist(), store.vectors()
    number_of = {name: number for number, name in enumerate(classes)}
    label_of = {record.id: record.label for record in source}
    truth = np.array([number_of[str(label_of[id_])] for id_ in ids])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # the store holds 16 bits
    skipped = [f"{id_}: {reason}" for id_, reason in embedded.errors]
    _check_classes(source, Counter(classes[number] for number in truth), classes)

    bank = LabelBank(embedder.model, embedder.processor.tokenizer, device=embedder.device, max_bytes=0)
    texts = bank.class_embeddings(classes, templates).cpu().numpy()
    on_progress("comparing classifiers", 0, 1)
    found = fit_few_shot(vectors, truth, texts, folds=folds)
    on_progress("comparing classifiers", 1, 1)

    right = truth[found.compared]
    unknown_below = float(np.quantile(found.nearest, unknown_rate))
    order = np.argsort(-found.best.logits, axis=1, kind="stable")[:, : min(5, len(classes))]
    zero_shot = next(one.accuracy for one in found.candidates if one.name == ZERO_SHOT)
    numbers: dict[str, Any] = {
        "unknown_below": unknown_below,
        "unknown_rate": unknown_rate,
        "unknown_found": float((found.nearest_other < unknown_below).mean()),
        "method": found.best.name,
        "accuracy": found.best.accuracy,
        "zero_shot": zero_shot,
        "pictures": len(truth),
    }
    classifier = _with_head(embedder, classes, found, numbers)
    if out is not None:
        with new_folder(out, overwrite=overwrite, marker="config.json") as folder:
            classifier.model.save_pretrained(folder)
            classifier.image_processor.save_pretrained(folder)
    return Learned(
        classifier=classifier,
        pictures=len(truth),
        method=found.best.name,
        accuracy=found.best.accuracy,
        zero_shot=zero_shot,
        candidates=found.candidates,
        confusion=ZeroShotAccuracy(tuple(classes), torch.from_numpy(right), torch.from_numpy(order.copy())),
        unknown_rate=unknown_rate,
        unknown_found=numbers["unknown_found"],
        skipped=skipped,
        unused=embedded.unused,
    )


def _check_classes(source: Source, pictures: Counter[Any], names: Sequence[str] | None = None) -> None:
    if len(names or pictures) < 2:
        raise ValueError(f"{source.name} has one class only, {next(iter(pictures))!r}; two or more can be told apart.")
    if few := [name for name in (names or pictures) if pictures[name] < 2]:
        raise ValueError(
            f"{source.name}: {few[0]!r}{f' and {len(few) - 1} more' if len(few) > 1 else ''} of "
            f"{len(names or pictures)} classes "
            "has fewer than two pictures that can be read; one is learned from, the other is tried."
        )


def _with_head(
    embedder: SiglipEmbedder, classes: Sequence[str], found: FewShot, numbers: dict[str, Any]
) -> HeadClassifier:
    """The checkpoint's tower, as it is on disk, with the classifier."""
    config = type(embedder.model.config.vision_config).from_dict(embedder.model.config.vision_config.to_dict())
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.learned_head = numbers
    naflex = isinstance(embedder.model, Siglip2Model)
    kind: Any = Siglip2ForImageClassification if naflex else SiglipForImageClassification
    # Not the embedder's own tower: its weights may be rounded to bfloat16.
    tower = load_model(embedder.name).vision_model
    with torch.device("meta"):
        model = kind(config)
    model.vision_model, model.classifier = tower, LearnedHead(*reversed(found.classifier.weight.shape))
    values = {"weight": found.classifier.weight, "bias": found.classifier.bias}
    state = {f"linear.{name}": torch.from_numpy(value) for name, value in values.items()}
    model.classifier.load_state_dict(state | {"class_means": torch.from_numpy(found.means)})
    model.config.dtype = tower.dtype
    return HeadClassifier(model.eval(), embedder.processor.image_processor)


def _of_classes(confusion: ZeroShotAccuracy) -> dict[str, Any]:
    return {"per_class": confusion.as_dict()["classes"]}
