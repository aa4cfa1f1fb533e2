"""Small sets of vectors with rows, shared by the tests of search."""

import numpy as np
import pyarrow as pa

from siglip_hf.search.backend import Origin

DIMENSION = 32
ORIGIN = Origin("a model", "0" * 64, DIMENSION, "image")


def clustered(count: int, dimension: int = DIMENSION, centres: int = 20, noise: float = 0.5, seed: int = 0):
    """(count, dimension) float32 of length 1 around some centres."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((centres, dimension))[rng.integers(0, centres, count)]
    vectors = vectors + noise * rng.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rows(numbers, texts=None) -> pa.Table:
    """A table of rows named by numbers: "000012.png" in the folder "even" or "odd"."""
    names = [f"{'odd' if number % 2 else 'even'}/{number:06d}.png" for number in numbers]
    return pa.table(
        {
            "id": pa.array(names, pa.string()),
            "path": pa.array([f"/pictures/{name}" for name in names], pa.string()),
            "width": pa.array([10 + number for number in numbers], pa.int32()),
            "height": pa.array([10] * len(names), pa.int32()),
            "sha256": pa.array([f"hash {number}" for number in numbers], pa.string()),
            "text": pa.array(texts or [None] * len(names), pa.string()),
        }
    )


def blocks(numbers, vectors, size: int = 700):
    """Rows and vectors of some numbers, block by block."""
    numbers = np.asarray(numbers)
    for start in range(0, len(numbers), size):
        chosen = numbers[start : start + size]
        yield rows(chosen.tolist()), vectors[chosen]
