"""Index folders: built from embeddings, kept up to date, checked when they are opened.

A folder holds `index.faiss` (any FAISS program reads it), `rows.parquet` (what each key of it stands for),
`vectors.f16` (the vectors themselves, mapped and not loaded, by which the candidates of a coarse index are ranked
exactly), and `manifest.json` with the model, the settings and a checksum of each file.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siglip_hf.output_folder import check_output_folder, new_folder
from siglip_hf.search import faiss_kinds
from siglip_hf.search.faiss_kinds import OVERSAMPLE

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, VERSION = "siglip_hf index", 1
MANIFEST, INDEX, ROWS, VECTORS = "manifest.json", "index.faiss", "rows.parquet", "vectors.f16"

#: Columns of `rows.parquet`; `key` is what FAISS knows the row by.
ROW_COLUMNS = ("id", "path", "width", "height", "sha256", "text", "key")

#: The effort of a search is raised until this share of the true ten nearest is found.
TARGET_RECALL = 0.98
RECALL_AT = 10
_RECALL_QUERIES = 256

_BLOCK = 65_536  # vectors read at a time
_STALE_SHARE = 0.2  # removed vectors in a graph, above which it is built anew


@dataclass(frozen=True)
class Origin:
    """What the vectors are: a query must come from the same.

    Attributes:
        model: the checkpoint, a folder or a name, as it was given.
        model_sha256: SHA-256 of its weights.
        dimension: length of a vector.
        content: what was embedded, "image" or "text".
    """

    model: str
    model_sha256: str
    dimension: int
    content: str


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
        recall: share of the true ten nearest that a search finds, on a sample.
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
    recall: float | None = None
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


#: Rows (`ROW_COLUMNS` without the key) and their vectors (n, dimension), block by block.
Blocks = Iterable[tuple["pa.Table", np.ndarray]]


def default_memory() -> int:
    """Bytes that an index may take unless told: half of the machine's memory."""
    import psutil

    return psutil.virtual_memory().total // 2


class IndexFolder:
    """An index folder that is open for reading.

    Attributes:
        path: the folder.
        manifest: its manifest.
        origin: what the vectors are.
        kind: kind of index.
        rows: table with `ROW_COLUMNS`.
        keys: (n,) int64, the key of each row.
        vectors: (n, dimension) float16, mapped, of length 1.
        index: the FAISS index.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Opens a folder.

        Args:
            path: the folder.
            verify: compare all files with their checksums, about a second for each 1.5 GB.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it is no index of this package, is of a later version, or is damaged.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        _check_files(self.path, self.manifest["files"], verify)
        faiss = faiss_kinds.import_faiss()
        import pyarrow.parquet as pq

        try:
            self.origin = Origin(**self.manifest["origin"])
            self.kind: str = self.manifest["kind"]
            self.effort: int | None = self.manifest["effort"]
            self.rows = pq.read_table(self.path / ROWS, memory_map=False)
            self.keys = self.rows["key"].to_numpy()
            self.index = faiss.read_index(str(self.path / INDEX))
        except (KeyError, TypeError, OSError, RuntimeError) as error:
            raise _damaged(self.path, str(error)) from error
        shape = (len(self.keys), self.origin.dimension)
        if self.index.d != shape[1] or (self.path / VECTORS).stat().st_size != 2 * shape[0] * shape[1]:
            raise _damaged(self.path, f"its files are not all for {shape[0]} vectors of {shape[1]} numbers")
        self.vectors = np.memmap(self.path / VECTORS, np.float16, "r", shape=shape)
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted_keys = self.keys[self._order]

    def __len__(self) -> int:
        return len(self.keys)

    def positions(self, keys: np.ndarray) -> np.ndarray:
        """Rows of keys, -1 for keys that are none (any more)."""
        if not len(self):
            return np.full(keys.shape, -1)
        at = np.minimum(np.searchsorted(self._sorted_keys, keys), len(self) - 1)
        return np.where(self._sorted_keys[at] == keys, self._order[at], -1)

    def nearest(
        self, queries: np.ndarray, k: int, among: np.ndarray | None = None, effort: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows of highest cosine for each query.

        Args:
            queries: (q, dimension) float32 of length 1.
            k: how many; fewer come back where there are fewer.
            among: row numbers that may be found; all if None.
            effort: instead of the one that the index was tuned to.

        Returns:
            For each query its rows and their exact cosines, best first.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if among is not None and len(among) <= faiss_kinds.FLAT_LIMIT:
            return [self._ranked(query, among, k) for query in queries]
        allowed = None
        if among is not None:
            allowed = np.sort(self.keys[among])
        elif self.index.ntotal != len(self):  # a graph still holds what was removed
            allowed = self._sorted_keys
        wanted = min(len(self), max(k * OVERSAMPLE[self.kind], k))
        if not wanted:
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        effort = self.effort if effort is None else effort
        if self.kind == "hnsw":
            effort = max(effort or 0, wanted)  # a graph search keeps no more candidates than its effort
        _, keys = faiss_kinds.search(self.index, self.kind, queries, wanted, effort, allowed)
        rows = self.positions(keys)
        return [self._ranked(query, found[found >= 0], k) for query, found in zip(queries, rows, strict=True)]

    def within(self, queries: np.ndarray, least: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """All rows with a cosine of at least `least` for each query, best first; as exact as the index is."""
        slack = 0.03 if self.kind.startswith("ivf") else 1e-3  # codes of a byte or less move a cosine by about this
        queries = np.ascontiguousarray(queries, np.float32)
        bounds, _, keys = faiss_kinds.search_range(self.index, self.kind, queries, least - slack, self.effort)
        results = []
        for query, start, end in zip(queries, bounds[:-1].astype(int), bounds[1:].astype(int), strict=True):
            found = self.positions(keys[start:end])
            rows, cosines = self._ranked(query, found[found >= 0], None)
            results.append((rows[cosines >= least], cosines[cosines >= least]))
        return results

    def _ranked(self, query: np.ndarray, rows: np.ndarray, k: int | None) -> tuple[np.ndarray, np.ndarray]:
        rows = np.sort(rows)  # the file is read forwards, and equal cosines keep the order of the rows
        cosines = np.asarray(self.vectors[rows], np.float32) @ query
        best = np.argsort(-cosines, kind="stable")[:k]
        return rows[best], cosines[best]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder.

    Raises:
        FileNotFoundError: if there is no folder.
        ValueError: if it is no index of this package or of a later version.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; make an index with `siglip-hf index`")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        is_ours = manifest.get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        is_ours, manifest = False, {}
    if not is_ours:
        if (folder / INDEX).exists() and (folder / ROWS).exists():
            raise _damaged(folder, f"its {MANIFEST} cannot be read")
        raise ValueError(f"{folder} is no index of this package; make one with `siglip-hf index`.")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder} is an index of version {manifest.get('version')}, and this package reads version {VERSION}; "
            "build it anew with `siglip-hf index`, or update the package."
        )
    return manifest


def is_index(folder: Path) -> bool:
    """Whether a folder is one that `build_index` made, sound or not."""
    return (folder / INDEX).is_file() and (folder / MANIFEST).is_file()


def build_index(
    origin: Origin,
    blocks: Blocks,
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    update: bool = False,
    queries: np.ndarray | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> IndexReport:
    """Builds or updates an index folder. It appears whole or not at all, however the work ends.

    An update takes out what is gone or has changed and adds what is new. A graph (HNSW) cannot forget: what was removed
    stays in it, is never returned, and once it is a fifth of the graph, the graph is built anew. So is any index that
    has outgrown its kind, or whose groups were learned from less than half or more than twice of what it now holds.

    Args:
        origin: what the vectors are.
        blocks: rows and vectors (n, dimension); read once. A row is the same as before if its id and its vector are.
        out: the folder to write.
        kind: one of `faiss_kinds.KINDS`; chosen by `faiss_kinds.choose_kind` if None.
        memory: bytes that the index may take; half of the machine's by default.
        overwrite: replace an index that is there.
        update: update the index that is there, or build it if there is none.
        queries: (q, dimension) vectors of typical queries, to tune and measure with; rows of the index if None.
        on_progress: called with a word for each stage of the work.

    Raises:
        ValueError: if there is no vector, another run writes there, no kind fits the memory, or an index to be updated
            has vectors of another model.
    """
    out = Path(out)
    memory = default_memory() if memory is None else memory
    with only_run(out):
        old = IndexFolder(out) if update and out.is_dir() and any(out.iterdir()) else None
        check_output_folder(out, overwrite=overwrite or update, marker=INDEX)
        if old is not None:
            check_same_origin(old.origin, origin, f"the index {out}", "the embeddings")
        with new_folder(out, overwrite=overwrite or update, marker=INDEX) as folder:
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
            faiss_kinds.import_faiss().write_index(index, str(folder / INDEX))
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
                "recall_at_10": None,
                "skipped": skipped,
                "files": {name: _file_entry(folder / name) for name in (INDEX, ROWS, VECTORS)},
            }
            _write_manifest(folder, manifest)
            del index  # the folder is read as a user will
            on_progress("measuring recall")
            report.effort, report.recall = _tune(IndexFolder(folder, verify=False), queries)
            _write_manifest(folder, manifest | {"effort": report.effort, "recall_at_10": report.recall})
    return report


def check_same_origin(first: Origin, second: Origin, first_name: str, second_name: str) -> None:
    """Refuses vectors that cannot be compared.

    Raises:
        ValueError: naming what differs.
    """
    if first.dimension != second.dimension:
        raise ValueError(
            f"{first_name} has vectors of {first.dimension} numbers and {second_name} of {second.dimension}: they are "
            "of different models. Build it anew, or use the model it was made with."
        )
    if first.model_sha256 != second.model_sha256:
        raise ValueError(
            f"{first_name} was made with {first.model} ({first.model_sha256[:12]}) and {second_name} with "
            f"{second.model} ({second.model_sha256[:12]}): vectors of different weights cannot be compared. Build it "
            "anew, or use the model it was made with."
        )
    if first.content != second.content:
        raise ValueError(f"{first_name} holds {first.content}s and {second_name} {second.content}s; keep them apart.")


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Holds the right to write a folder until the block ends, or the process does, and clears what a killed run left.

    Raises:
        ValueError: if another process has it.
    """
    from filelock import FileLock, Timeout

    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run is writing {out}; wait for it, or give another folder.") from error
    try:
        _clear_remains(out)
        yield
    finally:
        lock.release()


def _clear_remains(out: Path) -> None:
    # See `output_folder.new_folder`: it moves the old folder away before the new one takes its place.
    for kept in sorted(out.parent.glob(f".{glob.escape(out.name)}.replaced-*")):
        if out.exists():
            shutil.rmtree(kept)
        else:
            kept.rename(out)
    for partial in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        shutil.rmtree(partial)


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
            halves.tofile(file)
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


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


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


def _tune(folder: IndexFolder, queries: np.ndarray | None) -> tuple[int | None, float]:
    """The least effort that reaches `TARGET_RECALL`, or the best there is, and its recall at 10."""
    queries, own = _recall_queries(folder, queries)
    k = min(RECALL_AT, len(folder) - (own is not None))
    if k < 1:
        return _efforts(folder.kind)[0], 1.0
    truth = _exact_nearest(folder, queries, own, k)
    best: tuple[int | None, float] = (None, -1.0)
    for effort in _efforts(folder.kind):
        found = folder.nearest(queries, k + (own is not None), effort=effort)
        recall = _recall(found, truth, own, k)
        if recall > best[1]:
            best = (effort, recall)
        if recall >= TARGET_RECALL:
            break
    return best


def _efforts(kind: str) -> tuple[int | None, ...]:
    return faiss_kinds.EFFORTS[kind][1] if kind in faiss_kinds.EFFORTS else (None,)


def _recall_queries(folder: IndexFolder, queries: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Queries, and the row that each of them is, if it is one: finding oneself is no feat and does not count."""
    if queries is not None:
        return np.ascontiguousarray(queries, np.float32), None
    rows = np.sort(np.random.default_rng(1).choice(len(folder), min(_RECALL_QUERIES, len(folder)), replace=False))
    return np.asarray(folder.vectors[rows], np.float32), rows


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


def _recall(found: list[tuple[np.ndarray, np.ndarray]], least: np.ndarray, own: np.ndarray | None, k: int) -> float:
    """Share of the true k nearest among what was found. Equal pictures may stand for each other, so cosines decide."""
    hits = 0
    for number, (rows, cosines) in enumerate(found):
        others = cosines if own is None else cosines[rows != own[number]]
        hits += int((others[:k] >= least[number] - 1e-6).sum())
    return hits / (k * len(found))


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise _damaged(folder, f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
        if verify and _sha256(path) != entry["sha256"]:
            raise _damaged(folder, f"the checksum of {name} is not that of the manifest")


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"the index {folder} is damaged: {what}. Build it anew with `siglip-hf index`.")
