"""What the routes of one application share: the model in its towers, labels, indexes, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.search.query import SearchIndex
from siglip_hf.serving.indexes import Indexes
from siglip_hf.serving.labels import Labels
from siglip_hf.serving.metrics import CONTENT_TYPE, Metrics
from siglip_hf.serving.settings import Settings
from siglip_hf.serving.towers import Towers

_FETCHERS = 8  # addresses that are fetched at once


class Service:
    """The state of an application.

    Attributes:
        embedder: the model.
        name: what it is called.
        towers: the model, batched.
        labels: class embeddings.
        indexes: what can be searched.
        limits: what may be asked for.
        allows_urls: whether pictures are fetched from addresses.
        metrics: counters.
    """

    def __init__(self, settings: Settings, embedder: SiglipEmbedder | None = None) -> None:
        """Loads everything that is served.

        Args:
            settings: how.
            embedder: the model, if it is loaded already.

        Raises:
            OSError: if an index is not there.
            ValueError: if something cannot be loaded, or does not fit together.
        """
        self.embedder = embedder or load_embedder(settings)
        self.name = settings.name or Path(self.embedder.name).name
        self.limits, self.allows_urls = settings.limits, settings.allow_urls
        self.metrics = Metrics()
        self.towers = Towers(self.embedder, settings, self.metrics.on_batch)
        self.labels = Labels(self.towers, settings.label_bank)
        self.indexes = Indexes(settings.indexes, self.towers)
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "siglip-fetch")

    def close(self) -> None:
        """Ends all threads, when they have done what they do."""
        self.towers.close()
        self._fetchers.shutdown(cancel_futures=True)

    async def in_fetcher(self, function: Callable[[str], bytes], url: str) -> bytes:
        """The result of a function that waits for the network."""
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, function, url)

    def model_info(self) -> dict[str, Any]:
        """The model as `/v1/models` tells it."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "siglip-hf",
            "dimensions": self.embedder.dimension,
        }

    def metrics_text(self) -> tuple[bytes, str]:
        """Counters and times, and the content type."""
        for lane in (self.towers.pictures, self.towers.texts):
            self.metrics.pending.labels(lane.name).set(lane.pending)
        return self.metrics.text(), CONTENT_TYPE


def load_embedder(settings: Settings) -> SiglipEmbedder:
    """The model of some settings: the one that is named, or else that of the first index, or the embedded one.

    Raises:
        OSError: if an index is not there.
        ValueError: if it cannot be loaded.
    """
    model = settings.model
    if model is None and settings.indexes:
        model = SearchIndex.open(next(iter(settings.indexes.values())), verify=False).origin.model
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    embedder = SiglipEmbedder(
        model, device=settings.device, dtype=settings.dtype, fast=settings.fast, workers=settings.threads
    )
    embedder.batch_size = settings.batch_size or (32 if embedder.device.type == "cpu" else 64)
    return embedder
