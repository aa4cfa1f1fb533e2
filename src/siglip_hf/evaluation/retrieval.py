"""Recall of retrieval in both directions.

As in the SigLIP paper (arXiv:2303.15343, section 4), computed in blocks, so that memory follows the number of pictures
plus texts, never their product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

# Cosines that differ by less are equal: about what rounding does to a float32 product of unit vectors.
TIE_TOLERANCE = 1e-6
#: Rows in one block of cosines.
CHUNK_SIZE = 2048


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
    chunk_size: int = CHUNK_SIZE,
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
    images, texts = unit_rows(image_embeds, "image_embeds"), unit_rows(text_embeds, "text_embeds")
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


def unit_rows(embeds: torch.Tensor, name: str) -> torch.Tensor:
    """The rows of (N, E) at length 1, float32.

    Args:
        embeds: (N, E), floating point.
        name: what the caller calls it, for the error.

    Raises:
        ValueError: naming the tensor, if it is no matrix, empty or not finite.
    """
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
