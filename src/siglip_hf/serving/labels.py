"""Class embeddings for `/v1/classify`: from a bank, and what it lacks through the text lane, in turns with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from siglip_hf.inference.label_bank import LabelBank
from siglip_hf.inference.label_store import LabelStore
from siglip_hf.inference.pipeline import SCORES, ranked
from siglip_hf.serving.towers import Embedding, Towers


class Labels:
    """The labels of a server.

    Attributes:
        bank: what is known of them.
    """

    def __init__(self, towers: Towers, folder: str | None = None) -> None:
        """Starts with what is in a folder, if one is given."""
        embedder = towers.embedder
        self._towers = towers
        self.bank = LabelBank(
            embedder.model,
            embedder.processor.tokenizer,
            device=embedder.device,
            store=None if folder is None else LabelStore(folder),
        )

    async def classify(
        self,
        pictures: Sequence[Embedding],
        labels: Sequence[str],
        templates: Sequence[str],
        top_k: int | None,
        client: str,
    ) -> list[list[dict[str, Any]]]:
        """The labels of each picture, with their four scores, best first."""
        missing = await self._towers.in_thread(self.bank.missing, labels, templates)
        if missing:
            texts = [text for some in missing.values() for text in some]
            rows = iter(await self._towers.embed(texts, client))
            encoded = {
                label: torch.stack([torch.from_numpy(next(rows).vector) for _ in some])
                for label, some in missing.items()
            }
            await self._towers.in_thread(self.bank.remember, encoded, templates)
        return await self._towers.in_thread(self._scores, pictures, labels, templates, top_k)

    def _scores(
        self, pictures: Sequence[Embedding], labels: Sequence[str], templates: Sequence[str], top_k: int | None
    ) -> list[list[dict[str, Any]]]:
        classes = self.bank.class_embeddings(labels, templates).cpu()  # (C, E)
        images = torch.stack([torch.from_numpy(picture.vector) for picture in pictures])  # (B, E)
        model = self._towers.embedder.model
        scale, bias = (value.detach().float().cpu() for value in (model.logit_scale, model.logit_bias))
        cosines = images @ classes.t()  # (B, C)
        logits = cosines * scale.exp() + bias
        return [ranked(*row, labels, SCORES, top_k) for row in zip(cosines, logits, strict=True)]
