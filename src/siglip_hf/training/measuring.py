"""What the Trainer measures: the loss and recall of an evaluation set, and the mean logits of a training batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from siglip_hf.data.sources import Record, Source
from siglip_hf.evaluation.retrieval import retrieval_recall
from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.training.pairs import picture_key, positive_groups, stable_number, texts_of

RECALL_AT = (1, 5, 10)


class EvaluatedPictures(Dataset):
    """The pictures of a source, each once however many records hold it, and their texts.

    Attributes:
        texts: Each text with the place of its picture; a text once per picture.
    """

    def __init__(self, source: Source, templates: Sequence[str]):
        self.name = source.name
        self.records: list[Record] = []
        places: dict[int, int] = {}
        texts: dict[tuple[str, int], None] = {}
        for record in source:
            place = places.setdefault(picture_key(record), len(places))
            if place == len(self.records):
                self.records.append(record)
            texts |= {(text, place): None for text in texts_of(record, templates)}
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> tuple[int, Record]:
        return place, self.records[place]

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        return iter(enumerate(self.records))


@torch.no_grad()
def measure_pairs(
    dataset: EvaluatedPictures, images: dict[int, Tensor], texts: dict[int, Tensor], scalars: list[Tensor]
) -> tuple[int, dict[str, float]]:
    """On how many pictures, and the loss of all pairs as one batch and recall both ways.

    Args:
        dataset: The pictures and their texts.
        images: The embedding (E,) of each picture that could be read, by place.
        texts: The embedding (E,) of each text of `dataset`, by place.
        scalars: `logit_scale` and `logit_bias`.
    """
    if not images:
        raise ValueError(f"{dataset.name}: none of {len(dataset)} pictures could be read.")
    rows = {place: row for row, place in enumerate(sorted(images))}
    kept = [(place, text, rows[owner]) for place, (text, owner) in enumerate(dataset.texts) if owner in rows]
    image_embeds = torch.stack([images[place] for place in rows])  # (I, E)
    text_embeds = torch.stack([texts[place] for place, _, _ in kept])  # (T, E)
    owners = torch.tensor([owner for _, _, owner in kept])  # (T,)
    recall = retrieval_recall(image_embeds, text_embeds, owners, ks=[k for k in RECALL_AT if k < len(rows)] or [1])
    positives = positive_groups(owners, torch.tensor([stable_number("text", text) for _, text, _ in kept]))
    loss = sigmoid_loss(image_embeds[owners], text_embeds, *scalars, positives=positives)
    return len(rows), {"loss": loss.item(), **recall.as_dict()}


@torch.no_grad()
def mean_cosines(images: Tensor, texts: Tensor, positives: Tensor | None) -> Tensor:
    """(2,), the mean cosine of positive and of negative pairs of (B, E) embeddings: sums of them give both."""
    images, texts = images.float(), texts.float()
    if positives is None:
        right, count = (images * texts).sum(), float(len(images))
    else:
        distinct, place, sizes = positives.unique(return_inverse=True, return_counts=True)
        sums = [side.new_zeros(len(distinct), side.shape[1]).index_add_(0, place, side) for side in (images, texts)]
        right, count = (sums[0] * sums[1]).sum(), float(sizes.double().square().sum())
    wrong = images.sum(0) @ texts.sum(0) - right
    return torch.stack([right / count, wrong / max(len(images) ** 2 - count, 1.0)])
