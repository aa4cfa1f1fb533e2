"""Locked-image tuning: parts of a model that stay as they are, and image embeddings computed once for all epochs.

Source: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning" (2022); SigLiT in Zhai et al. (2023),
section 4.1.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from siglip_hf.data.embed import embed_source
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.items import items_of
from siglip_hf.data.sources import Record, Source
from siglip_hf.data.store import MANIFEST, EmbeddingStore, Manifest
from siglip_hf.files import sha256
from siglip_hf.preprocessing.image_intake import PictureError

_TOWERS = {"image": "vision_model", "text": "text_model"}


def freeze(model: nn.Module, parts: str | Iterable[str]) -> list[str]:
    """Turns off the gradients of parts of a model.

    Args:
        model: A `SiglipModel` or `Siglip2Model`.
        parts: Any of "image" and "text" (a whole tower), "image:6" (its embeddings and first 6 blocks), and patterns
            over the names of parameters with `*` and `?`, such as "logit_*" or "vision_model.head.*".

    Returns:
        The names of all parameters that are frozen now.

    Raises:
        ValueError: For a part that does not exist, and if nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted: set[str] = set()
    for part in [parts] if isinstance(parts, str) else parts:
        found = [name for pattern in _patterns(model, part) for name in fnmatch.filter(names, pattern)]
        if not found:
            raise ValueError(
                f"freeze: {part!r} matches no parameter; pass image, text, image:N, text:N (the first N blocks), or a "
                f"pattern of parameter names such as {names[0]!r} or 'vision_model.head.*'."
            )
        wanted.update(found)
    if all(name in wanted or not parameter.requires_grad for name, parameter in model.named_parameters()):
        raise ValueError("freeze: nothing would be left to train.")
    for name, parameter in model.named_parameters():
        if name in wanted:
            parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def _patterns(model: nn.Module, part: str) -> list[str]:
    """A part as patterns over parameter names."""
    tower, _, count = part.partition(":")
    if tower not in _TOWERS:
        return [part]
    prefix = _TOWERS[tower]
    if not count:
        return [f"{prefix}.*"]
    blocks = len(model.get_submodule(f"{prefix}.encoder.layers"))  # type: ignore[arg-type]
    if not count.isdigit() or not 1 <= int(count) <= blocks:
        raise ValueError(f"freeze: {part!r} must name a number of blocks between 1 and {blocks}, as in '{tower}:1'.")
    return [f"{prefix}.embeddings.*", *(f"{prefix}.encoder.layers.{index}.*" for index in range(int(count)))]


def image_weights_hash(model: nn.Module) -> str:
    """SHA-256 of the image tower: the names, types and values of its parameters."""

    def parts() -> Iterator[bytes]:
        for name, value in model.get_submodule("vision_model").state_dict().items():
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

    return sha256(parts())


class ImageStore:
    """The image embeddings of a source, mapped from disk; made by `store_images`.

    It is a folder of embeddings like those of `siglip-hf embed`, and verified like them when it is opened.

    Attributes:
        folder: Where it lies.
        embeddings: (N, E) float32, L2-normalized, mapped into memory; a row per picture that could be read.
        broken: By the id of a record, why its picture could not be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        stored = EmbeddingStore.open(folder)
        self.folder, self.manifest = stored.path, stored.manifest
        self.broken = dict(stored.errors())
        self.embeddings = stored.mapped_vectors()
        self._rows = {id_: row for row, id_ in enumerate(stored.rows(["id"])["id"].to_pylist())}
        self._stamps = stored.stamps()

    def __len__(self) -> int:
        return len(self._stamps)

    def read(self, record: Record) -> Tensor:
        """The embedding (E,) of a record's picture.

        Raises:
            PictureError: If the picture could not be read when the store was made.
            ValueError: If the store has no such record.
        """
        if record.id in self.broken:
            raise PictureError(self.broken[record.id], record.id)
        if record.id not in self._rows:
            raise ValueError(f"{self.folder} has no embedding of {record.id}; store the images of this source again.")
        return torch.from_numpy(np.array(self.embeddings[self._rows[record.id]]))

    def check(self, model: nn.Module, processor: Any, source: Source) -> None:
        """Makes sure that the store belongs to this image tower, these pixels and this source.

        Args:
            model: The model whose image tower is meant.
            processor: Its processor.
            source: The pictures.

        Raises:
            ValueError: naming what has changed since the store was made.
        """
        embedder = _embedder(model, processor)
        changed = _differences(self.manifest, embedder)
        if any(self._stamps.get(item.id, "") != item.stamp() for item in items_of(source, "image")):
            changed.append("source")
        _refuse(self.folder, changed)


def store_images(
    model: nn.Module,
    processor: Any,
    source: Source,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> ImageStore:
    """Embeds all pictures of a source once, or opens what was stored before.

    A call that was interrupted, however hard, is continued by the next; pictures that have changed are embedded again.

    Args:
        model: The model whose image tower is locked; it is not trained by this.
        processor: Its processor.
        source: The pictures, each record one.
        folder: Where to. It gets N * E * 4 bytes, and as much again while it is open.
        batch_size: Pictures in one forward.
        on_progress: Called with the number of pictures done, those of an interrupted call included.

    Raises:
        ValueError: If the folder belongs to another model or processor: a stale store is never used.
        OSError: If another run writes to it, or the disk is full.
    """
    folder = Path(folder)
    embedder = _embedder(model, processor, batch_size)
    if (folder / MANIFEST).exists():
        _refuse(folder, _differences(Manifest.read(folder), embedder))
        with contextlib.suppress(ValueError):  # it is not finished, damaged, or the pictures have changed
            store = ImageStore(folder)
            store.check(model, processor, source)
            return store

    def tell(done: int, total: int) -> None:
        if on_progress is not None and done:
            on_progress(len(source) - total + done)

    was_training = model.training
    model.eval()
    try:
        embed_source(source, folder, kind="image", embedder=embedder, store_dtype="float32", on_progress=tell)
    finally:
        model.train(was_training)
    return ImageStore(folder)


def _embedder(model: nn.Module, processor: Any, batch_size: int = 64) -> SiglipEmbedder:
    return SiglipEmbedder.of(model, processor, weights=image_weights_hash(model), batch_size=batch_size)


def _differences(manifest: Manifest, embedder: SiglipEmbedder) -> list[str]:
    """What embeddings depend on and has changed."""
    pairs = {
        "image tower": (manifest.model_sha256, embedder.model_sha256),
        "image processor": (manifest.preprocessing, embedder.preprocessing("image")),
    }
    return [name for name, (found, wanted) in pairs.items() if found != wanted]


def _refuse(folder: Path, changed: list[str]) -> None:
    if changed:
        raise ValueError(
            f"{folder} holds embeddings of another {' and '.join(changed)}; remove it, or give another folder."
        )
