"""Building and updating index folders (see `index`), whole or not at all, one run at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siglip_hf.files import check_output_folder, new_folder, write_sealed_json
from siglip_hf.search import kinds as faiss_kinds
from siglip_hf.search.backend import Origin, check_same_origin
from siglip_hf.search.index import (
    FORMAT,
    INDEX,
    MANIFEST,
    ROW_COLUMNS,
    ROWS,
    VECTORS,
    VERSION,
    IndexFolder,
    file_entry,
    is_index,
    read_manifest,
)

if TYPE_CHECKING:
    import pyarrow as pa

#: The effort of a search is raised until this share of the true ten nearest is found.
TARGET_RECALL = 0.98
RECALL_AT = 10
_RECALL_QUERIES = 256

_BLOCK = 65_536  # vectors read at a time
_STALE_SHARE = 0.2  # removed vectors in a graph, above which it is rebuilt


@dataclass
class IndexReport:
    """What became of an index.

    Attributes:
        kind: kind of index.
        reason: why this kind.
        action: "built", "updated" in place, or "rebuilt" because an update in place would have been poor.
        count: vectors that can be found.
        added: of these, how many are new or changed.
        removed: how many are gone or were changed.
        skipped: rows without an embedding.
        effort: setting of the search, as in `faiss_kinds.EFFORTS`.
        recall: share of the true ten nearest that a search finds, on a sample of the rows.
        recall_queries: the same for the queries that were given, or None.
        bytes: size of the index file, about what it takes in memory.
        notes: what else to know, a sentence each.
    """

    kind: str
    reason: str
    action: str
    count: int
    added: int
    removed: int
    skipped: int
    effort: int | None = None
    recall: float = 1.0
    recall_queries: float | None = None
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


#: Rows (`ROW_COLUMNS` without the key) and their vectors (n, dimension), block by block.
Blocks = Iterable[tuple["pa.Table", np.ndarray]]


def default_memory() -> int:
    """Bytes that an index may take unless told: half of the machine's memory."""
    import psutil

    return psutil.virtual_memory().total // 2


def build_index(
    origin: Origin,
    blocks: Blocks,
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    update: bool = False,
    make_queries: Callable[[], np.ndarray | None] = lambda: None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> IndexReport:
    """Builds or updates an index folder. It appears whole or not at all, however the work ends.

    An update takes out what is gone or has changed and adds what is new. A graph (HNSW) cannot forget: what was removed
    stays in it, is never returned, and once it is a fifth of the graph, the graph is rebuilt. So is any index that
    has outgrown its kind, or whose groups were learned from less than half or more than twice of what it now holds.

    Args:
        origin: what the vectors are.
        blocks: rows and vectors (n, dimension); read once. A row is the same as before if its id and its vector are.
        out: the folder to write.
        kind: one of `faiss_kinds.KINDS`; chosen by `faiss_kinds.choose_kind` if None.
        memory: bytes that the index may take; half of the machine's by default.
        overwrite: replace an index that is there.
        update: update the index that is there, or build it if there is none.
        make_queries: gives vectors (q, dimension) of typical queries, of texts for pictures; called if the index is
            not exact. Texts lie apart from pictures and need a wider search than rows of the index do.
        on_progress: called with a word for each stage of the work.

    Raises:
        ValueError: if there is no vector, no kind fits the memory, or an index to be updated has vectors of another
            model.
        OSError: if another run writes there, or the disk is full; the index that was there is as before.
    """
    out = Path(out)
    memory = default_memory() if memory is None else memory
    check_can_write(out, overwrite=overwrite, update=update)
    with new_folder(out, overwrite=overwrite or update, marker=INDEX) as folder:
        old = IndexFolder(out) if update and is_index(out) else None
        if old is not None:
            check_same_origin(old.origin, origin, f"the index {out}", "the embeddings")
        on_progress("reading the embeddings")
        table, skipped = _write_vectors(folder, origin, blocks, old)
        keys = table["key"].to_numpy()
        forced = kind or (old.manifest["forced"] if old is not None else None)
        choice = faiss_kinds.choose_kind(len(keys), origin.dimension, memory, forced)
        known = keys >= 0
        report = IndexReport(choice.kind, choice.reason, "built", len(keys), len(keys), 0, skipped)
        trained = len(keys)
        if old is not None:
            report.added, report.removed = int((~known).sum()), len(old) - int(known.sum())
            why = _why_rebuild(old, choice.kind, len(keys), report)
            report.action = "rebuilt" if why else "updated"
            report.notes += [why] if why else []
            trained = len(keys) if why else old.manifest["trained"]
        if old is not None and report.action == "updated":
            on_progress("updating")
            keys = _number_new(keys, old)
            index = _update(folder, old, keys, known, report)
        else:
            on_progress(f"building ({choice.kind})")
            keys = np.arange(len(keys))
            index = _build(folder, choice.kind, origin.dimension, len(keys))
        _write_rows(folder, table, keys)
        _write_index(folder, index)
        report.bytes = (folder / INDEX).stat().st_size
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "kind": choice.kind,
            "forced": forced,
            "reason": choice.reason,
            "count": len(keys),
            "trained": trained,
            "origin": asdict(origin),
            "effort": None,
            "skipped": skipped,
            "files": {name: file_entry(folder / name) for name in (INDEX, ROWS, VECTORS)},
        }
        _write_manifest(folder, manifest)
        del index  # the folder is read as a user will
        on_progress("measuring recall")
        _tune(IndexFolder(folder, verify=False), None if choice.kind == "flat" else make_queries(), report)
        tuned = {"effort": report.effort, "recall_at_10": report.recall}
        _write_manifest(folder, manifest | tuned | {"recall_at_10_queries": report.recall_queries})
    return report


def check_can_write(out: str | os.PathLike[str], *, overwrite: bool, update: bool) -> None:
    """Refuses what `build_index` would refuse; call it before work that takes long.

    Raises:
        ValueError: if something stands at the path that may not be replaced, or cannot be updated.
    """
    out = Path(out)
    if overwrite and update:
        raise ValueError("overwrite and update are both asked for; an index is either rebuilt or updated.")
    if out.is_dir() and any(out.iterdir()):
        if is_index(out) and not (overwrite or update):
            raise ValueError(f"{out} holds an index; update it (--update) or replace it (--overwrite).")
        if update:
            read_manifest(out)
    check_output_folder(out, overwrite=overwrite or update, marker=INDEX)


def _write_vectors(folder: Path, origin: Origin, blocks: Blocks, old: IndexFolder | None) -> tuple[pa.Table, int]:
    """Copies vectors, scaled to length 1; gives the rows, with the old key of those that are as before and else -1."""
    import pyarrow as pa

    old_rows = {} if old is None else {name: row for row, name in enumerate(old.rows["id"].to_pylist())}
    tables, skipped = [], 0
    with open(folder / VECTORS, "wb") as file:
        for table, block in blocks:
            if block.ndim != 2 or block.shape[1] != origin.dimension:
                raise ValueError(f"vectors of shape {block.shape} among those of {origin.dimension} numbers.")
            vectors = np.asarray(block, np.float32)
            lengths = np.linalg.norm(vectors, axis=1)
            usable = np.isfinite(lengths) & (lengths > 0)
            if not usable.all():
                table, vectors, lengths = table.filter(pa.array(usable)), vectors[usable], lengths[usable]
                skipped += int((~usable).sum())
            halves = (vectors / lengths[:, None]).astype(np.float16)
            file.write(halves)  # which, unlike `tofile`, says when the disk is full
            before = np.array([old_rows.get(name, -1) for name in table["id"].to_pylist()], np.int64)
            keys = np.full(len(before), -1, np.int64)
            if old is not None:
                candidates = np.flatnonzero(before >= 0)
                same = (old.vectors[before[candidates]] == halves[candidates]).all(axis=1)
                keys[candidates[same]] = old.keys[before[candidates[same]]]
            tables.append(table.append_column("key", pa.array(keys)))
    if not sum(map(len, tables)):
        raise ValueError(f"there is nothing to index: no row has an embedding ({skipped} without).")
    return pa.concat_tables(tables).combine_chunks(), skipped


def _write_rows(folder: Path, table: pa.Table, keys: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = table.set_column(table.column_names.index("key"), "key", pa.array(keys))
    pq.write_table(table.select(list(ROW_COLUMNS)), folder / ROWS)


def _write_index(folder: Path, index: Any) -> None:
    try:
        faiss_kinds.import_faiss().write_index(index, str(folder / INDEX))
    except RuntimeError as error:  # all that FAISS raises, whatever the system said
        reason = str(error).strip().split("\n")[-1]
        raise OSError(f"cannot write an index in {folder.parent}: {reason}; is the disk full?") from error


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_sealed_json(folder / MANIFEST, dict(manifest))


def _blocks_of(folder: Path, dimension: int, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and vectors, read and not mapped, so that they do not count as memory twice."""
    with open(folder / VECTORS, "rb") as file:
        for start in range(0, len(keys), _BLOCK):
            block = keys[start : start + _BLOCK]
            yield block, np.fromfile(file, np.float16, len(block) * dimension).reshape(-1, dimension).astype(np.float32)


def _build(folder: Path, kind: str, dimension: int, count: int) -> Any:
    def read_sample(wanted: int) -> np.ndarray:
        vectors = np.memmap(folder / VECTORS, np.float16, "r", shape=(count, dimension))
        rows = np.random.default_rng(0).choice(count, min(wanted, count), replace=False)
        return np.asarray(vectors[np.sort(rows)], np.float32)

    return faiss_kinds.build(kind, count, dimension, read_sample, _blocks_of(folder, dimension, np.arange(count)))


def _why_rebuild(old: IndexFolder, kind: str, count: int, report: IndexReport) -> str | None:
    if old.kind != kind:
        return f"it was {old.kind}, and {kind} is right now: {report.reason}"
    trained = old.manifest["trained"]
    if kind.startswith("ivf") and not trained / 2 <= count <= trained * 2:
        return f"its groups were learned from {trained:,} vectors, and there are {count:,} now"
    if not faiss_kinds.can_remove(kind):
        stale = old.index.ntotal - len(old) + report.removed
        if stale > _STALE_SHARE * (old.index.ntotal + report.added):
            return f"{stale:,} of {old.index.ntotal + report.added:,} vectors in the graph were of removed rows"
    return None


def _number_new(keys: np.ndarray, old: IndexFolder) -> np.ndarray:
    """The keys with those of new rows above all that are in the index, also of what a graph could not forget."""
    first = 1 + max(int(old.keys.max(initial=-1)), old.index.ntotal - 1)
    keys = keys.copy()
    new = keys < 0
    keys[new] = np.arange(first, first + int(new.sum()))
    return keys


def _update(folder: Path, old: IndexFolder, keys: np.ndarray, known: np.ndarray, report: IndexReport) -> Any:
    gone = np.setdiff1d(old.keys, keys)
    if len(gone) and faiss_kinds.can_remove(old.kind):
        old.index.remove_ids(gone)
    elif len(gone):
        report.notes.append(
            f"{len(gone):,} removed vectors stay in the graph, which cannot forget, and are never returned"
        )
    added = keys[~known]
    rows = np.flatnonzero(~known)
    vectors = np.memmap(folder / VECTORS, np.float16, "r", shape=(len(keys), old.origin.dimension))
    blocks = (
        (added[i : i + _BLOCK], np.asarray(vectors[rows[i : i + _BLOCK]], np.float32))
        for i in range(0, len(rows), _BLOCK)
    )
    faiss_kinds.add(old.index, blocks)
    return old.index


def _tune(folder: IndexFolder, queries: np.ndarray | None, report: IndexReport) -> None:
    """Sets the least effort that reaches `TARGET_RECALL`, or else the most, and its recall at 10."""
    if folder.kind not in faiss_kinds.EFFORTS or len(folder) < 2:
        return
    rows = np.sort(np.random.default_rng(1).choice(len(folder), min(_RECALL_QUERIES, len(folder)), replace=False))
    own = _Sample(folder, np.asarray(folder.vectors[rows], np.float32), rows)
    given = None if queries is None else _Sample(folder, np.ascontiguousarray(queries, np.float32), None)
    for effort in faiss_kinds.EFFORTS[folder.kind][1]:
        report.effort, report.recall = effort, own.recall(effort)
        report.recall_queries = None if given is None else given.recall(effort)
        if min(report.recall, 1.0 if report.recall_queries is None else report.recall_queries) >= TARGET_RECALL:
            break


class _Sample:
    """Queries with the cosine that the k-th nearest row of each has."""

    def __init__(self, folder: IndexFolder, queries: np.ndarray, own: np.ndarray | None) -> None:
        # A query that is a row of the index (`own` says which) finds itself, which is no feat and does not count.
        self.folder, self.queries, self.own = folder, queries, own
        self.k = min(RECALL_AT, len(folder) - (own is not None))
        self.least = _exact_nearest(folder, queries, own, self.k)

    def recall(self, effort: int) -> float:
        """Share of the true k nearest that is found. Equal pictures may stand for each other, so cosines decide."""
        hits = 0
        found = self.folder.nearest(self.queries, self.k + (self.own is not None), effort=effort)
        for number, (rows, cosines) in enumerate(found):
            others = cosines if self.own is None else cosines[rows != self.own[number]]
            hits += int((others[: self.k] >= self.least[number] - 1e-6).sum())
        return hits / (self.k * len(self.queries))


def _exact_nearest(folder: IndexFolder, queries: np.ndarray, own: np.ndarray | None, k: int) -> np.ndarray:
    """The k-th highest cosine of each query (q,), over all rows but its own: what a found row must reach."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    start = 0
    for keys, block in _blocks_of(folder.path, folder.origin.dimension, np.arange(len(folder))):
        cosines = queries @ block.T  # (q, n)
        if own is not None:
            inside = (own >= start) & (own < start + len(keys))
            cosines[np.flatnonzero(inside), own[inside] - start] = -np.inf
        merged = np.concatenate([best, cosines], axis=1)
        best = -np.partition(-merged, k - 1, axis=1)[:, :k]
        start += len(keys)
    return best.min(axis=1)
