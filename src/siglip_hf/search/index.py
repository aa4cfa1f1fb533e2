"""Index folders, for reading: checked when they are opened, asked for the nearest rows (`index_build` writes them).

A folder holds `index.faiss` (any FAISS program reads it), `rows.parquet` (what each key of it stands for),
`vectors.f16` (the vectors themselves, mapped and not loaded, by which the candidates of a coarse index are ranked
exactly), and `manifest.json` with the model, the settings and a checksum of each file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from siglip_hf.files import read_sealed_json, sha256_of_files
from siglip_hf.search import kinds as faiss_kinds
from siglip_hf.search.backend import ROUNDING, Neighbours, Origin, exact_cosines, glob_to_regex
from siglip_hf.search.kinds import KINDS, OVERSAMPLE

FORMAT, VERSION = "siglip_hf index", 2  # version 1 had no checksum of the manifest; it is still read
MANIFEST, INDEX, ROWS, VECTORS = "manifest.json", "index.faiss", "rows.parquet", "vectors.f16"

#: Columns of `rows.parquet`; `key` is what FAISS knows the row by.
ROW_COLUMNS = ("id", "path", "width", "height", "sha256", "text", "key")


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
        faiss = faiss_kinds.import_faiss()
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            _check_files(self.path, self.manifest["files"], verify)
            self.origin = Origin(**self.manifest["origin"])
            self.kind: str = self.manifest["kind"]
            self.effort: int | None = self.manifest["effort"]
            self.rows = pq.read_table(self.path / ROWS, memory_map=False)
            self.keys = self.rows["key"].to_numpy()
            self.index = faiss.read_index(str(self.path / INDEX))
            if self.kind not in KINDS or not isinstance(self.effort, int | None) or "trained" not in self.manifest:
                raise TypeError(f"kind {self.kind!r} and effort {self.effort!r} are not known")
        except (KeyError, TypeError, AttributeError, OSError, RuntimeError, pa.ArrowException) as error:
            raise _damaged(self.path, f"{type(error).__name__}: {error}") from error
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
        if not len(self):
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        allowed = None
        if among is not None:
            allowed = np.sort(self.keys[among])
        elif self.index.ntotal != len(self):  # a graph still holds what was removed
            allowed = self._sorted_keys
        # As many for one answer as for ten, or the first answer would be less sure than the first of ten.
        wanted = k + 1 if self.kind == "flat" else max(k + 1, 10) * OVERSAMPLE[self.kind]
        found: dict[int, np.ndarray] = {}
        left = np.arange(len(queries))
        while len(left):
            wanted = min(wanted, len(self))
            products, keys = self._search(queries[left], wanted, effort, allowed)
            # Where equal rows lie on both sides of the end, which ones come back is chance: then more are asked for.
            cut = (products[:, -1] >= products[:, min(k, wanted) - 1] - ROUNDING) & (keys[:, -1] >= 0)
            cut &= wanted < len(self)
            rows = self.positions(keys)
            found.update((number, rows[i]) for i, number in enumerate(left.tolist()) if not cut[i])
            left, wanted = left[cut], 4 * wanted
        return [self._ranked(query, found[i][found[i] >= 0], k) for i, query in enumerate(queries)]

    def _search(
        self, queries: np.ndarray, wanted: int, effort: int | None, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        effort = self.effort if effort is None else effort
        if self.kind == "hnsw":
            effort = max(effort or 0, wanted)  # a graph search keeps no more candidates than its effort
        return faiss_kinds.search(self.index, self.kind, queries, wanted, effort, allowed)

    def neighbours(self, queries: np.ndarray, k: int, path_filter: str | None) -> list[Neighbours]:
        """As in `Backend`."""
        among = None if path_filter is None else self.matching(path_filter)
        columns = self.rows.select(["id", "path", "text"])
        return [
            Neighbours(columns.take(rows), np.asarray(self.vectors[rows], np.float32))
            for rows, _ in self.nearest(queries, k, among)
        ]

    def matching(self, pattern: str) -> np.ndarray:
        """Numbers of the rows whose path or id matches a pattern with `*`, `?` and `[...]`."""
        import pyarrow.compute as pc

        expression = glob_to_regex(pattern)
        matches = [
            pc.fill_null(pc.match_substring_regex(self.rows[name], expression), False) for name in ("path", "id")
        ]
        return np.flatnonzero(pc.or_(*matches).to_numpy())

    def sample(self, count: int) -> np.ndarray:
        """As in `Backend`: rows at equal distances."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))
        return np.asarray(self.vectors[rows], np.float32)

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
        vectors = np.asarray(self.vectors[rows], np.float32)
        if k is not None and k < len(rows):
            rough = vectors @ query
            near = rough >= np.partition(rough, -k)[-k] - ROUNDING
            rows, vectors = rows[near], vectors[near]
        cosines = exact_cosines(vectors, query)
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
        manifest = read_sealed_json(folder / MANIFEST)
        is_ours, problem = manifest.get("format") == FORMAT, f"its {MANIFEST} is that of something else"
    except (OSError, ValueError) as error:
        is_ours, manifest, problem = False, {}, f"its {MANIFEST} cannot be read: {error}"
    if not is_ours:
        if (folder / INDEX).exists() and (folder / ROWS).exists():
            raise _damaged(folder, problem)
        raise ValueError(f"{folder} is no index of this package; make one with `siglip-hf index`.")
    if manifest.get("version") not in (1, VERSION):
        raise ValueError(
            f"{folder} is an index of version {manifest.get('version')}, and this package reads version {VERSION}; "
            "build it again with `siglip-hf index`, or update the package."
        )
    if manifest["version"] != 1 and "checksum" not in manifest:
        raise _damaged(folder, f"the checksum of its {MANIFEST} is missing")
    return manifest


def is_index(folder: Path) -> bool:
    """Whether a folder is one that `build_index` made, sound or not."""
    return (folder / INDEX).is_file() and (folder / MANIFEST).is_file()


def file_entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, for a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_files([path])}


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise _damaged(folder, f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
        if verify and sha256_of_files([path]) != entry["sha256"]:
            raise _damaged(folder, f"the checksum of {name} is not that of the manifest")


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"the index {folder} is damaged: {what}. Build it again with `siglip-hf index`.")
