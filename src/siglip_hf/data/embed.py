"""Embeds a whole source into a folder: what is there is kept, what is new or has changed is done, what is gone goes.

The plan of a run follows from the source and the folder alone, and so do its batches. A run that was killed therefore
goes on as if nothing had happened (see `store`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from siglip_hf.data import store
from siglip_hf.data.items import Item, embed_items, items_of
from siglip_hf.data.sources import Source, open_source
from siglip_hf.data.store import MANIFEST, EmbeddingStore, EmbeddingWriter, Manifest
from siglip_hf.parallel import prefetch

if TYPE_CHECKING:
    from datasets import Dataset

    from siglip_hf.data.embedder import SiglipEmbedder


@dataclass
class Embedded:
    """What a run did.

    Attributes:
        path: the folder.
        manifest: what it holds now.
        done: rows made in this run.
        kept: rows that were there, of this source.
        removed: rows taken away, because they are no longer in the source.
        errors: id and error of each row without an embedding.
        seconds: time that making the rows took.
        unused: entries of the source that hold nothing to embed, a line each.
        damaged: files of the folder that were damaged or missing; their rows have been rebuilt.
    """

    path: Path
    manifest: Manifest
    done: int = 0
    kept: int = 0
    removed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    unused: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def embed_source(
    source: str | os.PathLike[str] | Iterable[str] | Source | Dataset,
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    kind: Literal["image", "text"] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    store_dtype: Literal["float16", "float32"] = "float16",
    fast: bool = True,
    workers: int | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    embedder: SiglipEmbedder | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Embeds all pictures or texts of a source into a folder, or brings the folder up to date.

    It may be killed at any moment; the same call goes on where it stopped, and the result is the same. A picture that
    cannot be read becomes a row with its error, and is tried again when it has changed.

    Args:
        source: what `open_source` takes.
        out: the folder; see `store`. It is made, or brought up to date.
        model: folder or name of a checkpoint; the embedded one by default.
        kind: what to embed; pictures by default, texts if there are no pictures.
        image_column, caption_column, split: as in `open_source`.
        batch_size: pictures or texts in one forward.
        device: "cpu", "cuda", ...; the first accelerator by default.
        dtype: of the tower; see `SiglipEmbedder`. That of the folder if it has been begun.
        store_dtype: of the stored numbers.
        fast: as in `SiglipEmbedder`.
        workers: threads that read and decode; with Ray, actors (by default one for each GPU, or for each node).
        engine: "ray" spreads the work over a Ray cluster; all nodes must see the same files.
        address: of the cluster; by default one is started on this machine.
        embedder: a model that is loaded, in place of `model`, `batch_size`, `device`, `dtype`, `fast` and `workers`.
        on_progress: called with the rows done and the rows to do in this run.

    Raises:
        ValueError: if there is nothing to embed, or the folder holds something else: rows of another model, or of
            another source altogether.
        OSError: if another run writes to the folder, or the disk is full.
    """
    from siglip_hf.data.embedder import SiglipEmbedder

    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} must be 'local' or 'ray'.")
    if kind not in (None, "image", "text"):
        raise ValueError(f"kind={kind!r} must be 'image' or 'text'.")
    if store_dtype not in ("float16", "float32"):
        raise ValueError(f"store_dtype={store_dtype!r} must be 'float16' or 'float32'.")
    if engine == "local" and address is not None:
        raise ValueError(f"address={address!r} is that of a Ray cluster; pass engine='ray' (--engine ray) too.")
    if not isinstance(source, Source):
        source = open_source(source, image_column=image_column, caption_column=caption_column, split=split)
    if kind is None:
        kind = "image" if any(record.image is not None for record in source) else "text"
    source = source.require("image" if kind == "image" else "captions", keep_broken=True)
    items = items_of(source, kind)
    if embedder is None and dtype is None and (Path(out) / MANIFEST).exists():
        dtype = Manifest.read(out).compute_dtype
    on_ray = engine == "ray"
    embedder = embedder or SiglipEmbedder(
        model,
        device="cpu" if on_ray and device is None else device,
        dtype=dtype,
        batch_size=batch_size,
        fast=fast,
        workers=None if on_ray else workers,
    )
    with EmbeddingWriter(out, _manifest(embedder, kind, store_dtype)) as writer:
        todo, removed = _bring_up_to_date(writer, items)
        result = Embedded(writer.path, writer.manifest, removed=removed, unused=source.unused, damaged=writer.damaged)
        result.kept = len(items) - len(todo)
        start = time.perf_counter()
        on_progress(0, len(todo))
        if on_ray and todo:
            from siglip_hf.data.ray_engine import embed_on_ray

            batches = embed_on_ray(embedder, todo, device=device, actors=workers, address=address)
        else:
            batches = embed_items(embedder, todo)
        for rows, embeddings in batches:
            writer.append(rows, embeddings)
            result.done += len(rows)
            on_progress(result.done, len(todo))
        result.seconds = time.perf_counter() - start
        result.manifest = writer.finish()
        result.errors = EmbeddingStore(writer.path, result.manifest).errors()
    return result


def _manifest(embedder: SiglipEmbedder, kind: Literal["image", "text"], dtype: Any) -> Manifest:
    return Manifest(
        kind=kind,
        model=embedder.name,
        model_sha256=embedder.model_sha256,
        preprocessing=embedder.preprocessing(kind),
        dimension=embedder.dimension,
        dtype=dtype,
        compute_dtype=str(embedder.dtype).removeprefix("torch."),
        part_rows=store.PART_ROWS,
    )


def _bring_up_to_date(writer: EmbeddingWriter, items: Sequence[Item]) -> tuple[list[Item], int]:
    """Takes away the rows of what is gone or has changed; what is left to do, and how many are gone."""
    gone = writer.known.keys() - {item.id for item in items}
    if gone and len(gone) == len(writer.known):  # a mistyped path must not cost a day of computing
        raise ValueError(
            f"{writer.path} holds {len(gone)} rows, and none of them is in this source; give another folder, or remove "
            "this one."
        )
    stamps: dict[str, str | None] = {}
    doubtful = []
    for item in items:
        if item.id in writer.known:
            stamp = item.stamp()
            if stamp != writer.known[item.id] or item.id in writer.unread:
                doubtful.append(item)
                stamps[item.id] = stamp
    # A copied or touched file has another stamp and the same content.
    stored = writer.sha256(stamps)
    hashes = prefetch(doubtful, lambda item: item.sha256(), workers=8)
    changed = {item.id for item, now in zip(doubtful, hashes, strict=True) if now != stored[item.id]}
    touched = {id_: stamp for id_, stamp in stamps.items() if id_ not in changed and stamp != writer.known[id_]}
    writer.revise(gone | changed, touched)
    return [item for item in items if item.id not in writer.known], len(gone)
