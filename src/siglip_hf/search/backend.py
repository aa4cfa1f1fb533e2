"""What an index folder and the tables of vector databases have in common: where vectors come from, and who is near."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

#: Cosines that differ by less may come in either order, or be cut apart, by an index that rounds as it likes.
ROUNDING = 1e-5


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


@dataclass(frozen=True)
class Neighbours:
    """Rows near a query, best first: a table with `id`, `path` and `text`, and their vectors (n, dimension) float32."""

    rows: pa.Table
    vectors: np.ndarray


class Backend(Protocol):
    """Where the vectors are: an index folder, or a table of a vector database.

    Attributes:
        origin: what the vectors are.
        kind: of index, such as "flat", or the name of the database.
    """

    origin: Origin
    kind: str

    def __len__(self) -> int: ...

    def neighbours(self, queries: np.ndarray, k: int, path_filter: str | None) -> list[Neighbours]:
        """The k nearest rows of each query (q, dimension), among those whose path or id matches a pattern."""
        ...

    def sample(self, count: int) -> np.ndarray:
        """About so many of the vectors, (n, dimension) float32."""
        ...


def check_same_origin(first: Origin, second: Origin, first_name: str, second_name: str) -> None:
    """Refuses vectors that cannot be compared.

    Raises:
        ValueError: naming what differs.
    """
    if first.dimension != second.dimension:
        raise ValueError(
            f"{first_name} has vectors of {first.dimension} numbers and {second_name} of {second.dimension}: they are "
            "of different models. Build it again, or use the model it was made with."
        )
    if first.model_sha256 != second.model_sha256:
        raise ValueError(
            f"{first_name} was made with {first.model} ({first.model_sha256[:12]}) and {second_name} with "
            f"{second.model} ({second.model_sha256[:12]}): vectors of different weights cannot be compared. Build it "
            "again, or use the model it was made with."
        )
    if first.content != second.content:
        raise ValueError(f"{first_name} holds {first.content}s and {second_name} {second.content}s; keep them apart.")


def exact_cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Products (n,) of vectors (n, D) with a query (D,), as float32.

    Those of equal vectors are equal bit for bit, whatever stands beside them; a matrix product does not promise that.
    """
    return np.einsum("nd,d->n", vectors.astype(np.float64), query.astype(np.float64)).astype(np.float32)


def nearest_of(fetch: Callable[[int], tuple[np.ndarray, np.ndarray]], query: np.ndarray, k: int) -> np.ndarray:
    """The k nearest in an order that does not depend on k: by cosine, then by name.

    Where several rows share the cosine of the last one, a database returns any of them. So more are asked for until the
    last that comes back is clearly further away.

    Args:
        fetch: gives names (n,) and vectors (n, D) of so many rows, about the nearest; fewer if there are no more.
        query: (D,) float32.
        k: how many.

    Returns:
        (k,), or fewer: places in what was fetched last, best first.
    """
    limit = k + 1
    while True:
        names, vectors = fetch(limit)
        cosines = exact_cosines(vectors, query)
        order = np.lexsort((names, -cosines))
        if len(names) < limit or cosines[order[-1]] < cosines[order[k - 1]] - ROUNDING:
            return order[:k]
        limit *= 4


def glob_to_regex(pattern: str) -> str:
    """A regular expression for the whole text that Python, Arrow and Rust read alike; `*` also stands for slashes."""
    parts = []
    for piece in re.findall(r"\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if len(piece) > 1:
            inside = piece[1:-1].replace("\\", "\\\\")
            parts.append(f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]")
        else:
            parts.append({"*": ".*", "?": "."}.get(piece) or re.escape(piece))
    return f"(?s)^{''.join(parts)}$"
