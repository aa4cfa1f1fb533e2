"""Zero-shot accuracy: each picture gets the class most similar to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from siglip_hf.evaluation.retrieval import CHUNK_SIZE, unit_rows


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

    def interval(self, k: int) -> tuple[float, float]:
        """Where `top(k)` lies for all pictures of this kind, with 95% confidence: Wilson's interval of a share.

        It takes the pictures as drawn by chance from that kind, and knows nothing of pictures of another kind.
        """
        share, pictures, z = self.top(k), len(self.truth), 1.959964
        middle = (share + z * z / (2 * pictures)) / (1 + z * z / pictures)
        half = z * math.sqrt(share * (1 - share) / pictures + z * z / (4 * pictures**2)) / (1 + z * z / pictures)
        return middle - half, middle + half

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
    chunk_size: int = CHUNK_SIZE,
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
    images, classes = unit_rows(image_embeds, "image_embeds"), unit_rows(class_embeds, "class_embeds")
    if len(classes) < 2 or len(classes) != len(labels):
        raise ValueError(f"{len(classes)} classes with {len(labels)} labels: there must be two or more, a label each.")
    right = torch.as_tensor(truth).cpu()
    if right.shape != images.shape[:1] or right.min() < 0 or right.max() >= len(classes):
        raise ValueError(f"truth must hold {len(images)} numbers of classes, from 0 to {len(classes) - 1}.")
    width = min(5, len(classes))
    best = [(part @ classes.T).topk(width, dim=1).indices.cpu() for part in images.split(chunk_size)]
    return ZeroShotAccuracy(tuple(labels), right, torch.cat(best))


def name_classes(
    found: Sequence[str], given: Sequence[str] | None = None, numbered: bool = False
) -> tuple[Sequence[str], dict[str, int]]:
    """Names of the classes that pictures are compared with, and the number among them of each label that was found.

    Without `given`, a label is its own name with underscores read as spaces. With it, these are the candidates, and a
    label is found among them, whatever its case, or is a number that counts them from 0; or, if not one is found and
    there are as many of both, the candidates name the labels in their sorted order (as ImageNet's folders are named).

    Args:
        found: labels of the source.
        given: candidates, in their order.
        numbered: labels are numbers that count the candidates, even where a candidate is called like one of them.

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
    missing = [label for label in found if numbered or readable[label].casefold() not in place]
    if not missing:
        return given, {label: place[readable[label].casefold()] for label in found}
    if numeric and max(map(int, found)) < len(given):
        return given, {label: int(label) for label in found}
    if len(missing) == len(found) == len(given) and not numeric and not numbered:
        return given, {label: number for number, label in enumerate(sorted(found))}
    raise ValueError(
        f"{len(missing)} of {len(found)} classes are not among the {len(given)} labels given, such as "
        f"{', '.join(map(repr, missing[:3]))}."
    )
