"""From a source or a folder of embeddings to an index: what `siglip-hf index` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from siglip_hf.data.store import MANIFEST, EmbeddingStore
from siglip_hf.search.build import IndexReport, build_index, check_can_write
from siglip_hf.search.index import ROW_COLUMNS, Origin
from siglip_hf.search.kinds import check_kind


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
                "them. Leave it out, or embed the pictures anew."
            )
        return store, store.errors(), []
    from siglip_hf.data.embed import embed_source

    source = sources[0] if len(sources) == 1 else list(sources)
    made = embed_source(source, folder, model=model, batch_size=batch_size, device=device, on_progress=on_embedded)
    return EmbeddingStore.open(made.path), made.errors, made.unused


def _typical_queries(origin: Origin) -> np.ndarray | None:
    """Vectors of words for pictures; None for an index of texts, or if the model is gone."""
    from siglip_hf.search.query import load_embedder
    from siglip_hf.search.words import WORDS

    if origin.content != "image":
        return None
    try:
        return load_embedder(origin).embed_texts(WORDS)
    except ValueError:  # vectors can be indexed without their model; recall is then measured on rows only
        return None
