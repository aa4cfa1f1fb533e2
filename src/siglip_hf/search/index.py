"""Index folders, for reading: checked when they are opened, asked for the nearest rows (`index_build` writes them).

A folder holds `index.faiss` (any FAISS program reads it), `rows.parquet` (what each key of it stands for),
`vectors.f16` (the vectors themselves, mapped and not loaded, by which the candidates of a coarse index are ranked
exactly), and `manifest.json` with the model, the settings and a checksum of each file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siglip_hf.files import parse_json, sha256_of_files
from siglip_hf.search import kinds as faiss_kinds
from siglip_hf.search.kinds import OVERSAMPLE

FORMAT, VERSION = "siglip_hf index", 1
MANIFEST, INDEX, ROWS, VECTORS = "manifest.json", "index.faiss", "rows.parquet", "vectors.f16"

#: Columns of `rows.parquet`; `key` is what FAISS knows the row by.
ROW_COLUMNS = ("id", "path", "width", "height", "sha256", "text", "key")


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
        # As many for one answer as for ten, or the first answer would be less sure than the first of ten.
        wanted = min(len(self), k if self.kind == "flat" else max(k, 10) * OVERSAMPLE[self.kind])
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
        manifest = parse_json((folder / MANIFEST).read_bytes())
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
    return ValueError(f"the index {folder} is damaged: {what}. Build it anew with `siglip-hf index`.")
