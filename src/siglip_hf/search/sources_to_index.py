"""From a source or a folder of embeddings to an index: what `siglip-hf index` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from siglip_hf.data.embed import embed_source
from siglip_hf.data.store import MANIFEST, EmbeddingStore
from siglip_hf.search.backend import Origin, check_same_origin
from siglip_hf.search.build import IndexReport, build_index, check_can_write
from siglip_hf.search.index import ROW_COLUMNS
from siglip_hf.search.kinds import check_kind
from siglip_hf.search.query import load_embedder
from siglip_hf.search.vector_db import BATCH, COLUMNS, table_of
from siglip_hf.search.words import WORDS


@dataclass
class Indexed:
    """What `index_source` did.

    Attributes:
        embeddings: the folder of embeddings.
        index: what became of the index.
        errors: id and error of each picture that has no embedding.
        unused: entries of the source that hold nothing to embed, a line each; empty if it was embedded before.
    """

    embeddings: Path
    index: IndexReport
    errors: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass
class Exported:
    """What went to a database.

    Attributes:
        embeddings: the folder of embeddings.
        count: rows in the table.
        added: rows written in this run, new or changed.
        removed: rows that were there and are gone.
        errors: id and error of each picture that has no embedding.
        unused: entries of the source that hold nothing to embed, a line each.
    """

    embeddings: Path
    count: int
    added: int
    removed: int
    errors: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def origin_of(store: EmbeddingStore) -> Origin:
    """What the vectors of a folder of embeddings are."""
    manifest = store.manifest
    return Origin(manifest.model, manifest.model_sha256, manifest.dimension, manifest.kind)


def index_embeddings(store: EmbeddingStore, out: str | os.PathLike[str], **options: Any) -> IndexReport:
    """Builds or updates an index of a folder of embeddings.

    Args:
        store: the embeddings.
        out: the folder to write.
        options: as `build_index` takes them.

    Raises:
        ValueError: see `build_index`.
    """
    origin = origin_of(store)
    report = build_index(
        origin,
        store.iter_batches([name for name in ROW_COLUMNS if name != "key"]),
        out,
        make_queries=lambda: _typical_queries(origin),
        **options,
    )
    report.skipped += store.manifest.errors
    if not store.has_checksums:
        report.notes.append(
            "the embeddings are of an earlier version without checksums, so damage to them cannot be found; "
            "`siglip-hf embed` adds them"
        )
    return report


def is_embeddings(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a folder that `siglip-hf embed` made."""
    return (Path(source) / MANIFEST).is_file() and any(Path(source).glob("*.parquet"))


def index_source(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    embeddings: str | os.PathLike[str] | None = None,
    model: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    kind: str | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    update: bool = False,
    on_embedded: Callable[[int, int], None] = lambda done, total: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Indexed:
    """Indexes a folder of embeddings, or embeds a source first.

    Args:
        sources: one folder of embeddings, or pictures and texts as `open_source` takes them.
        out: the index folder.
        embeddings: where embeddings of a source go, and stay for the next update; "OUT.embeddings" by default.
        model: checkpoint to embed with; the embedded one by default.
        batch_size: pictures or texts in one forward.
        device: where the model runs.
        kind, memory, overwrite, update: as in `build_index`.
        on_embedded: called with the rows embedded and the rows to embed.
        on_stage: called with a word for each stage of indexing.

    Raises:
        ValueError: if there is nothing to index, or the output may not be written.
    """
    check_kind(kind)
    check_can_write(out, overwrite=overwrite, update=update)
    options: dict[str, Any] = {"kind": kind, "memory": memory, "overwrite": overwrite, "update": update}
    store, errors, unused = embedded(
        sources, embeddings or f"{os.fspath(out)}.embeddings", model, batch_size, device, on_embedded
    )
    report = index_embeddings(store, out, on_progress=on_stage, **options)
    return Indexed(store.path, report, errors, unused)


def embedded(
    sources: Sequence[str],
    folder: str | os.PathLike[str],
    model: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    on_embedded: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[EmbeddingStore, list[tuple[str, str]], list[str]]:
    """The embeddings of a source, made in `folder` unless the source is itself a folder of embeddings.

    Returns:
        The embeddings, id and error of what has none, and what the source holds besides.

    Raises:
        ValueError: if there is nothing to embed, or a model is given that did not make the embeddings.
    """
    if len(sources) == 1 and is_embeddings(sources[0]):
        store = EmbeddingStore.open(sources[0])
        if model is not None and os.path.abspath(model) != os.path.abspath(store.manifest.model):
            raise ValueError(
                f"{sources[0]} holds embeddings made with {store.manifest.model}; --model {model} would not change "
                "them. Leave it out, or embed the pictures again."
            )
        return store, store.errors(), []
    source = sources[0] if len(sources) == 1 else list(sources)
    made = embed_source(source, folder, model=model, batch_size=batch_size, device=device, on_progress=on_embedded)
    return EmbeddingStore.open(made.path), made.errors, made.unused


def export_source(
    sources: Sequence[str],
    to: str,
    place: str,
    *,
    embeddings: str | os.PathLike[str] | None = None,
    model: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
    update: bool = False,
    on_embedded: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Fills a table of a database with the vectors of a source.

    Args:
        sources: one folder of embeddings, or pictures and texts as `open_source` takes them, which are embedded first.
        to: "lancedb" or "qdrant".
        place: DATABASE/TABLE.
        embeddings: where embeddings of a source go; "DATABASE/TABLE.embeddings" by default, if that is a folder.
        model, batch_size, device: for embedding.
        overwrite: replace a table that is there.
        update: write only rows that are new or whose file has changed, and remove those that are gone.
        on_embedded: called with the rows embedded and the rows to embed.

    Raises:
        ImportError: naming the extra to install.
        ValueError: if the table is there and neither `overwrite` nor `update` is given, if it holds vectors of another
            model, or if there is nothing to write.
    """
    if overwrite and update:
        raise ValueError("overwrite and update are both asked for; a table is either refilled or updated.")
    kind, database, name = table_of(to, place)
    if embeddings is None and "://" in database:
        embeddings = f"{name}.embeddings"
    store, errors, unused = embedded(
        sources, embeddings or f"{place}.embeddings", model, batch_size, device, on_embedded
    )
    if not len(store):
        raise ValueError(f"there is nothing to write: no row of {store.path} has an embedding.")
    origin = origin_of(store)
    table = kind.open(database, name)
    try:
        if table is not None and not (overwrite or update):
            raise ValueError(f"{to}:{place} is there; update it (--update) or replace it (--overwrite).")
        if table is not None and update:
            check_same_origin(table.origin, origin, f"{to}:{place}", "the embeddings")
        else:
            if table is not None:
                table.close()
            table = kind.create(database, name, origin)
        result = Exported(store.path, 0, 0, 0, errors, unused)
        before = table.hashes() if update else {}
        seen: set[str] = set()
        for rows, vectors in store.iter_batches(COLUMNS):
            ids, hashes = rows["id"].to_pylist(), rows["sha256"].to_pylist()
            seen.update(ids)
            changed = np.array(
                [now is None or before.get(id_) != now for id_, now in zip(ids, hashes, strict=True)], bool
            )
            for start in range(0, len(ids), BATCH):
                chosen = np.flatnonzero(changed[start : start + BATCH]) + start
                if len(chosen):
                    units = vectors[chosen] / np.linalg.norm(vectors[chosen], axis=1, keepdims=True)
                    table.write(rows.take(chosen), units)
                    result.added += len(chosen)
        gone = [id_ for id_ in before if id_ not in seen]
        for start in range(0, len(gone), BATCH):
            table.remove(gone[start : start + BATCH])
        result.removed = len(gone)
        table.finish()
        result.count = len(table)
        return result
    finally:
        if table is not None:
            table.close()


def _typical_queries(origin: Origin) -> np.ndarray | None:
    """Vectors of words for pictures; None for an index of texts, or if the model is gone."""
    if origin.content != "image":
        return None
    try:
        return load_embedder(origin).embed_texts(WORDS)
    except ValueError:  # vectors can be indexed without their model; recall is then measured on rows only
        return None
