"""Locked-image tuning: parts of a model that stay as they are, and image embeddings computed once for all epochs.

Source: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning" (2022); SigLiT in Zhai et al. (2023),
section 4.1.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from siglip_hf.data.sources import DatasetCell, Record, Source, TarMember
from siglip_hf.files import sha256, write_json
from siglip_hf.parallel import prefetch
from siglip_hf.preprocessing.image_intake import PictureError
from siglip_hf.training.collator import PictureCollator

_TOWERS = {"image": "vision_model", "text": "text_model"}
_MANIFEST, _PROGRESS, _EMBEDDINGS = "manifest.json", "progress.json", "embeddings.npy"
# Batches between two notes of how far a store has come.
_NOTE_EVERY = 16


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


def source_hash(source: Source) -> str:
    """SHA-256 of where a source's pictures lie; for files, also of their sizes and the times they were changed."""
    return sha256(f"{record.id}\0{_place(record)}\n".encode() for record in source)


def _place(record: Record) -> str:
    image = record.image
    if isinstance(image, DatasetCell):
        return f"{image.dataset._fingerprint} {image.row} {image.column}"
    path = image.path if isinstance(image, TarMember) else record.path
    try:
        stat = os.stat(path) if path else None
    except OSError:
        return f"{image} missing"
    return f"{image} {stat.st_size} {stat.st_mtime_ns}" if stat else str(image)


class ImageStore:
    """The image embeddings of a source, mapped from disk; made by `store_images`.

    Attributes:
        folder: Where it lies.
        embeddings: (N, E) float32, L2-normalized, mapped into memory; a row per record.
        broken: By the id of a record, why its picture could not be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / _MANIFEST).read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} holds no finished image embeddings ({_MANIFEST} is missing)") from error
        self.broken: dict[str, str] = self.manifest["broken"]
        self._rows = {id_: row for row, id_ in enumerate(self.manifest["ids"])}
        self.embeddings = np.load(self.folder / _EMBEDDINGS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

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
        _refuse_other(self.folder, self.manifest, _identity(model, processor, source))


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

    A call that was interrupted, however hard, is continued by the next.

    Args:
        model: The model whose image tower is locked; it is not trained by this.
        processor: Its processor.
        source: The pictures, each record one.
        folder: Where to. It gets N * E * 4 bytes.
        batch_size: Pictures in one forward.
        on_progress: Called with the number of pictures done, those of an interrupted call included.

    Raises:
        ValueError: If the folder belongs to another model, processor or source: a stale store is never used.
    """
    folder = Path(folder)
    identity = _identity(model, processor, source)
    if (folder / _MANIFEST).exists():
        store = ImageStore(folder)
        _refuse_other(folder, store.manifest, identity)
        return store
    folder.mkdir(parents=True, exist_ok=True)
    done, broken = 0, {}
    if (folder / _PROGRESS).exists():
        progress = json.loads((folder / _PROGRESS).read_text())
        _refuse_other(folder, progress, identity)
        done, broken = progress["done"], progress["broken"]
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no image embeddings; give another folder.")
    else:
        write_json(folder / _PROGRESS, {**identity, "done": 0, "broken": {}})

    device = next(model.parameters()).device
    collate = PictureCollator(processor)
    numbered = list(enumerate(source))
    batches = [numbered[start : start + batch_size] for start in range(done, len(source), batch_size)]
    was_training = model.training
    model.eval()
    embeddings = None
    for index, batch in enumerate(prefetch(batches, collate)):
        places, readable = batch.pop("places"), batch.pop("readable")
        broken |= dict(batch.pop("broken"))
        with torch.no_grad():
            output = model(**{name: value.to(device) for name, value in batch.items()}, return_dict=True)
        rows = output.image_embeds.float().cpu()
        rows[~readable] = 0
        if embeddings is None:
            embeddings = _open_rows(folder / _EMBEDDINGS, len(source), rows.shape[1])
        embeddings[places[0] : places[-1] + 1] = rows.numpy()
        done = int(places[-1]) + 1
        if index % _NOTE_EVERY == _NOTE_EVERY - 1:
            embeddings.flush()
            write_json(folder / _PROGRESS, {**identity, "done": done, "broken": broken})
        if on_progress is not None:
            on_progress(done)
    model.train(was_training)
    if embeddings is not None:
        embeddings.flush()
    write_json(folder / _MANIFEST, {**identity, "broken": broken, "ids": [record.id for record in source]})
    (folder / _PROGRESS).unlink(missing_ok=True)
    return ImageStore(folder)


def _open_rows(path: Path, count: int, width: int) -> np.memmap:
    """The file of embeddings, made if it is not there."""
    shape = (count, width)
    if path.exists():
        rows = np.lib.format.open_memmap(path, mode="r+")
        if rows.shape == shape:
            return rows
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _identity(model: nn.Module, processor: Any, source: Source) -> dict[str, str]:
    """What embeddings depend on, each as a hash."""
    settings = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    return {
        "image tower": image_weights_hash(model),
        "image processor": sha256([settings.encode()]),
        "source": source_hash(source),
    }


def _refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, str]) -> None:
    changed = [name for name, value in wanted.items() if found.get(name) != value]
    if changed:
        raise ValueError(
            f"{folder} holds embeddings of another {' and '.join(changed)}; remove it, or give another folder."
        )
