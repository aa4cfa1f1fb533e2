"""The kinds of FAISS index that `siglip-hf index` makes: which fits a collection, how it is built, what it costs.

All of them compare by inner product, which is the cosine for vectors of length 1, and know a vector by a key that stays
its own when others come and go. How the kinds work: M. Douze et al., The Faiss library, arXiv:2401.08281.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from siglip_hf.extras import missing

KINDS = ("flat", "hnsw", "ivf-sq8", "ivf-pq")

#: Up to this many vectors are compared with every query, all of them: no loss, and still milliseconds.
FLAT_LIMIT = 100_000
#: A graph answers fastest, but takes minutes to build from here on, and nothing can be taken out of it.
HNSW_LIMIT = 300_000

#: How many times more candidates an index is asked for than are wanted; the exact vectors then decide among them.
OVERSAMPLE = {"flat": 1, "hnsw": 1, "ivf-sq8": 3, "ivf-pq": 30}

#: What the effort of a search is called in FAISS, and its steps. A flat index has none.
EFFORTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "hnsw": ("efSearch", (32, 64, 128, 256, 512)),
    "ivf-sq8": ("nprobe", (4, 8, 16, 32, 64, 128, 256)),
    "ivf-pq": ("nprobe", (4, 8, 16, 32, 64, 128, 256)),
}

_LINKS = 32  # of a graph's vertex in its upper layers; twice as many in the lowest
_CONSTRUCTION = 80
_TRAIN_PER_LIST = 39  # what FAISS asks for at least
_SEED = 1234


def import_faiss() -> Any:
    """The FAISS library.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import faiss
    except ImportError as error:
        raise missing("search needs `faiss-cpu`", "search") from error
    return faiss


@dataclass(frozen=True)
class Choice:
    """A kind of index for a collection.

    Attributes:
        kind: one of `KINDS`.
        reason: why, in one sentence.
        memory: bytes that the index takes, by `memory_of`.
    """

    kind: str
    reason: str
    memory: int


def memory_of(kind: str, count: int, dimension: int) -> int:
    """Bytes of memory of an index of `count` vectors; the rows and the mapped exact vectors come on top."""
    key = 8
    each = {
        "flat": 4 * dimension + key,
        # Links of 4 bytes: twice _LINKS in the lowest layer; about one vertex in _LINKS is in a layer above too.
        "hnsw": 2 * dimension + 4 * (2 * _LINKS + 2) + key,
        "ivf-sq8": dimension + key,
        "ivf-pq": _code_bytes(dimension) + key,
    }[kind]
    centroids = 4 * dimension * list_count(count) if kind.startswith("ivf") else 0
    return each * count + centroids


def check_kind(kind: str | None) -> None:
    """Refuses what is no kind of index.

    Raises:
        ValueError: naming the kinds that there are.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of index; choose one of {', '.join(KINDS)}.")


def choose_kind(count: int, dimension: int, memory: int, forced: str | None = None) -> Choice:
    """The kind of index for so many vectors.

    Args:
        count: vectors.
        dimension: their length.
        memory: bytes that the index may take.
        forced: this kind, whatever the size.

    Raises:
        ValueError: if there is no such kind, or none (or not the forced one) fits the memory.
    """
    check_kind(forced)
    needs = {kind: memory_of(kind, count, dimension) for kind in KINDS}
    if forced is not None:
        if needs[forced] > memory:
            raise ValueError(
                f"{forced} needs {gigabytes(needs[forced])} for {count:,} vectors of {dimension} numbers, and "
                f"{gigabytes(memory)} are allowed; allow more memory or choose another kind."
            )
        return Choice(forced, "as asked", needs[forced])
    reasons = []
    for kind, limit, virtue in (
        ("flat", FLAT_LIMIT, "compares every vector and so misses nothing"),
        ("hnsw", HNSW_LIMIT, "answers fastest at this size"),
        ("ivf-sq8", None, "looks into a few of many groups of vectors, a byte per number"),
        ("ivf-pq", None, "is the smallest"),
    ):
        if limit is not None and count > limit:
            reasons.append(f"more than {limit:,} vectors, the limit of {kind}")
        elif needs[kind] > memory:
            reasons.append(f"{kind} would need {gigabytes(needs[kind])} of {gigabytes(memory)}")
        else:
            return Choice(kind, "; ".join([*reasons, f"{kind} {virtue}"]), needs[kind])
    raise ValueError(
        f"no index of {count:,} vectors of {dimension} numbers fits in {gigabytes(memory)}: ivf-pq, the smallest, "
        f"needs {gigabytes(needs['ivf-pq'])}. Allow more memory, or use a vector database (--to)."
    )


def list_count(count: int) -> int:
    """Groups of an IVF index: about two times the root of the count, a power of two, with enough vectors for each."""
    wanted = round(math.log2(max(1.0, 2 * math.sqrt(count))))
    return 2 ** min(wanted, int(math.log2(max(1.0, count / _TRAIN_PER_LIST))))


def build(
    kind: str,
    count: int,
    dimension: int,
    read_sample: Callable[[int], np.ndarray],
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Any:
    """Trains and fills an index.

    Args:
        kind: one of `KINDS`.
        count: how many vectors there will be.
        dimension: their length.
        read_sample: gives so many of the vectors, (n, dimension) float32, spread over all; fewer if there are fewer.
        blocks: keys (n,) int64 and vectors (n, dimension) float32 of length 1.
    """
    faiss = import_faiss()
    product = faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
    elif kind == "hnsw":
        graph = faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_fp16, _LINKS, product)
        graph.hnsw.efConstruction = _CONSTRUCTION
        graph.train(read_sample(1))  # sixteen-bit floats learn nothing, but FAISS wants to be asked
        index = faiss.IndexIDMap2(graph)
    else:
        lists = list_count(count)
        coarse = faiss.IndexFlatIP(dimension)
        if kind == "ivf-sq8":
            index = faiss.IndexIVFScalarQuantizer(coarse, dimension, lists, faiss.ScalarQuantizer.QT_8bit, product)
        else:
            code = _code_bytes(dimension)
            # Fewer bits where there are too few vectors to learn 256 centroids from.
            bits = min(8, max(1, int(math.log2(max(2, count / _TRAIN_PER_LIST)))))
            index = faiss.IndexIVFPQ(coarse, dimension, lists, code, bits, product)
        index.cp.spherical = True
        index.cp.seed = _SEED
        index.train(read_sample(max(_TRAIN_PER_LIST * lists, 10_000)))
    add(index, blocks)
    return index


def add(index: Any, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Adds vectors under their keys."""
    for keys, vectors in blocks:
        index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(keys, np.int64))


def can_remove(kind: str) -> bool:
    """Whether vectors can be taken out. A graph leads through all of its vertices, so HNSW keeps them."""
    return kind != "hnsw"


def search(
    index: Any, kind: str, queries: np.ndarray, k: int, effort: int | None, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest vectors as the index sees them.

    Args:
        index: an index.
        kind: its kind.
        queries: (q, dimension) float32.
        k: how many for each.
        effort: as in `EFFORTS`; None for a flat index.
        allowed: keys that may be found, sorted; all if None.

    Returns:
        Inner products (q, k) and keys (q, k), best first; the key is -1 where there are no more.
    """
    return index.search(queries, k, params=_parameters(index, kind, effort, allowed))


def search_range(index: Any, kind: str, queries: np.ndarray, least: float, effort: int | None) -> tuple[Any, Any, Any]:
    """All vectors with an inner product above `least`: bounds (q + 1,), products and keys, in FAISS's form."""
    return index.range_search(queries, least, params=_parameters(index, kind, effort, None))


def _parameters(index: Any, kind: str, effort: int | None, allowed: np.ndarray | None) -> Any:
    faiss = import_faiss()
    arguments: dict[str, Any] = {}
    if allowed is not None:
        bits = np.zeros(int(allowed[-1]) + 1 if len(allowed) else 1, dtype=bool)
        bits[allowed] = True
        arguments["sel"] = faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
    if kind in EFFORTS and effort is not None:
        arguments[EFFORTS[kind][0]] = effort
    parameters = {
        "flat": faiss.SearchParameters,
        "hnsw": faiss.SearchParametersHNSW,
        "ivf-sq8": faiss.SearchParametersIVF,
        "ivf-pq": faiss.IVFPQSearchParameters,
    }[kind]
    return parameters(**arguments)


def _code_bytes(dimension: int) -> int:
    """Bytes per vector under product quantization: one for 8 numbers where that divides the dimension."""
    return next(parts for parts in range(max(1, dimension // 8), 0, -1) if dimension % parts == 0)


def gigabytes(count: int) -> str:
    """Bytes for people, in units of 10^9, 10^6 or 10^3."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def parse_bytes(text: str) -> int:
    """Bytes out of "4GB", "500 MB" or a plain number.

    Raises:
        ValueError: if it is none of these, or not above 0.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().upper().rstrip("BKMGT ")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} is no amount of memory; write it like 4GB or 500MB.")
    return int(value)
