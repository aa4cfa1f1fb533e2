"""Near-duplicates in an index: the same file twice, and pictures that differ by size, compression or a crop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from siglip_hf.search.index import IndexFolder

#: Cosine from which two pictures count as one.
DEFAULT_THRESHOLD = 0.95

_BLOCK = 256  # rows whose neighbours are looked for together


@dataclass(frozen=True)
class Member:
    """A picture or text of a group.

    Attributes:
        id: name of the row.
        path: its picture, or None.
        cosine: to the first of the group.
        same_file: it has the bytes of the first.
        width: of the picture, in pixels, or None.
        height: of the picture, in pixels, or None.
        text: what was embedded, in an index of texts.
    """

    id: str
    path: str | None
    cosine: float
    same_file: bool
    width: int | None = None
    height: int | None = None
    text: str | None = None


def find_duplicates(
    folder: IndexFolder, threshold: float = DEFAULT_THRESHOLD, *, on_progress: Callable[[int], None] = lambda done: None
) -> list[list[Member]]:
    """Groups of rows that are nearly the same.

    Each group has a first member, the largest picture, to which all others are compared, so that a group does not
    drift from picture to picture. Files of equal bytes are in one group whatever the threshold. As good as the index
    is: an exact one (`flat`) misses none.

    Args:
        folder: the index.
        threshold: least cosine to the first of the group, above 0 and up to 1.
        on_progress: called with the number of rows just done.

    Returns:
        Groups of two members or more, the largest group first; in each the first member, then by cosine.

    Raises:
        ValueError: for a threshold that is none.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
    hashes = folder.rows["sha256"].to_pylist()
    order = np.argsort(-_pixels(folder), kind="stable")
    same: dict[str, list[int]] = {}
    for row in order.tolist():
        if hashes[row] is not None:
            same.setdefault(hashes[row], []).append(row)
    taken = np.zeros(len(folder), bool)
    groups: list[list[tuple[int, float]]] = []
    for start in range(0, len(order), _BLOCK):
        rows = [row for row in order[start : start + _BLOCK].tolist() if not taken[row]]
        queries = np.asarray(folder.vectors[rows], np.float32)
        near = folder.within(queries, threshold - 1e-3) if rows else []  # sixteen-bit vectors are not quite of length 1
        for row, query, (found, _) in zip(rows, queries, near, strict=True):
            if taken[row]:
                continue
            others = set(found.tolist()) | set(same.get(hashes[row], ())) - {row}
            candidates = [other for other in sorted(others - {row}) if not taken[other]]
            lengths = np.linalg.norm(folder.vectors[candidates].astype(np.float32), axis=1) * np.linalg.norm(query)
            cosines = np.minimum(folder.vectors[candidates].astype(np.float32) @ query / np.maximum(lengths, 1e-12), 1)
            group = [
                (other, float(cosine))
                for other, cosine in zip(candidates, cosines, strict=True)
                if cosine >= threshold - 1e-6 or (hashes[row] is not None and hashes[other] == hashes[row])
            ]
            if group:
                taken[[row, *(other for other, _ in group)]] = True
                groups.append([(row, 1.0), *sorted(group, key=lambda pair: -pair[1])])
        on_progress(len(order[start : start + _BLOCK]))
    groups.sort(key=len, reverse=True)
    return [[_member(folder, row, cosine, group[0][0]) for row, cosine in group] for group in groups]


def _pixels(folder: IndexFolder) -> np.ndarray:
    width, height = (folder.rows[name].to_numpy().astype(np.float64) for name in ("width", "height"))
    return np.nan_to_num(width * height)


def _member(folder: IndexFolder, row: int, cosine: float, first: int) -> Member:
    values = {name: folder.rows[name][row].as_py() for name in ("id", "path", "width", "height", "sha256", "text")}
    same = values.pop("sha256") == folder.rows["sha256"][first].as_py() is not None
    return Member(cosine=cosine, same_file=same and row != first, **values)
