"""Groups of an index that look alike, named by words from a list: spherical k-means by FAISS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from siglip_hf.search.index import IndexFolder
from siglip_hf.search.kinds import import_faiss

_ROUNDS = 20
_SAMPLE_PER_CLUSTER = 256  # more do not move the centres
_BLOCK = 16_384
_SEED = 1234
_WORDS_SHOWN = 3


@dataclass(frozen=True)
class Cluster:
    """Rows that look alike.

    Attributes:
        label: the word that fits best.
        words: the best words with their cosines to the centre, best first.
        size: number of rows.
        ids: names of the rows, the most typical first.
        paths: their pictures.
        cosines: of the rows to the centre.
    """

    label: str
    words: list[tuple[str, float]]
    size: int
    ids: list[str]
    paths: list[str | None]
    cosines: list[float]


def find_clusters(
    folder: IndexFolder, words: Sequence[str], word_vectors: np.ndarray, count: int | None = None
) -> list[Cluster]:
    """Groups the rows of an index.

    A word names the cluster whose pictures it fits better than it fits pictures at large: some words have a higher
    cosine to everything.

    Args:
        folder: the index.
        words: W names to choose from.
        word_vectors: (W, dimension) float32, their embeddings of length 1.
        count: number of clusters; the root of half the rows by default.

    Returns:
        The clusters, largest first; an empty one is left out.

    Raises:
        ValueError: if there are no words, or more clusters than rows.
    """
    if not len(words) or len(words) != len(word_vectors):
        raise ValueError(
            f"{len(words)} words and {len(word_vectors)} vectors of them; give one for each of some words."
        )
    count = max(1, round(math.sqrt(len(folder) / 2))) if count is None else count
    if not 1 <= count <= len(folder):
        raise ValueError(f"{count} clusters of {len(folder)} rows; ask for 1 to {len(folder)}.")
    centres = _centres(folder, count)
    nearest = np.empty(len(folder), np.int64)
    cosines = np.empty(len(folder), np.float32)
    word_sum = np.zeros(len(words))
    for start in range(0, len(folder), _BLOCK):
        block = np.asarray(folder.vectors[start : start + _BLOCK], np.float32)
        products = block @ centres.T  # (n, count)
        nearest[start : start + len(block)] = products.argmax(axis=1)
        cosines[start : start + len(block)] = products.max(axis=1)
        word_sum += (block @ word_vectors.T).sum(axis=0)
    at_large = word_sum / len(folder)  # (W,)
    clusters = []
    for number, centre in enumerate(centres):
        rows = np.flatnonzero(nearest == number)
        if not len(rows):
            continue
        rows = rows[np.argsort(-cosines[rows], kind="stable")]
        fit = word_vectors @ centre
        best = np.argsort(at_large - fit, kind="stable")[:_WORDS_SHOWN]
        chosen = folder.rows.take(rows)
        clusters.append(
            Cluster(
                label=words[best[0]],
                words=[(words[i], float(fit[i])) for i in best],
                size=len(rows),
                ids=chosen["id"].to_pylist(),
                paths=chosen["path"].to_pylist(),
                cosines=cosines[rows].tolist(),
            )
        )
    return sorted(clusters, key=lambda cluster: -cluster.size)


def _centres(folder: IndexFolder, count: int) -> np.ndarray:
    """(count, dimension) of length 1."""
    faiss = import_faiss()
    rows = np.random.default_rng(_SEED).choice(
        len(folder), min(len(folder), _SAMPLE_PER_CLUSTER * count), replace=False
    )
    sample = np.asarray(folder.vectors[np.sort(rows)], np.float32)
    means = faiss.Kmeans(
        folder.origin.dimension,
        count,
        niter=_ROUNDS,
        spherical=True,
        seed=_SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=_SAMPLE_PER_CLUSTER,
    )
    means.train(sample)
    return means.centroids
