"""Asking an index: words, a picture, both, and what it should not be; answers with named scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siglip_hf.search.backend import Backend, Neighbours, Origin, exact_cosines
from siglip_hf.search.index import IndexFolder

if TYPE_CHECKING:
    from siglip_hf.data.embedder import SiglipEmbedder

#: How much the text of `not_text` counts, beside 1 for what is asked for: enough to push it down, and not so much that
#: whatever is least like it comes up.
NOT_WEIGHT = 0.5

_SPREAD_SAMPLE = 1024  # rows by which the spread of a query's cosines is estimated


@dataclass(frozen=True)
class Query:
    """One question.

    Attributes:
        text: what it should show, in words.
        image: a picture that it should be like, as `load_picture` takes it.
        not_text: what it should not show.
    """

    text: str | None = None
    image: Any = None
    not_text: str | None = None

    def __str__(self) -> str:
        parts = [
            repr(self.text) if self.text else "",
            (os.fspath(self.image) if isinstance(self.image, str | os.PathLike) else "a picture")
            if self.image is not None
            else "",
            f"not {self.not_text!r}" if self.not_text else "",
        ]
        return " and ".join(part for part in parts if part)


@dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        id: the row's name, unique in the index.
        path: its picture, as `siglip_hf.data.store.picture_at` reads it; None if it has none.
        cosine: to the query, in -1..1. With several parts in the query, to their combination.
        probability: that the text and the picture belong together, by the model's sigmoid; None where the query and the
            row are of one kind (picture and picture), as the model gives no probability for that.
        text: what was embedded, in an index of texts.
    """

    id: str
    path: str | None
    cosine: float
    probability: float | None
    text: str | None = None


class SearchIndex:
    """An index that can be asked.

    Attributes:
        backend: where the vectors are.

    Examples:
        >>> from siglip_hf import SearchIndex
        >>> from siglip_hf.search import index_source
        >>> made = index_source(["drawings"], "drawings.idx")  # or on the command line: siglip-hf index
        >>> index = SearchIndex.open("drawings.idx")
        >>> index
        SearchIndex(24 images, flat, siglip-hf-pictures-64)
        >>> [hit.id for hit in index.search("a rocket", k=1)]
        ['rocket.png']
    """

    def __init__(
        self,
        backend: Backend,
        *,
        model: str | None = None,
        device: str | None = None,
        embedder: SiglipEmbedder | None = None,
    ) -> None:
        self.backend, self._model, self._device = backend, model, device
        if embedder is not None:
            check_weights(embedder, backend.origin)
        self._embedder = embedder
        self._sample: np.ndarray | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        device: str | None = None,
        verify: bool = True,
        embedder: SiglipEmbedder | None = None,
    ) -> SearchIndex:
        """Opens an index; the model is loaded with the first query.

        Args:
            path: an index folder, or a table of a vector database: "lancedb:FOLDER/TABLE", "qdrant:FOLDER/COLLECTION"
                or "qdrant:http://host:6333/COLLECTION".
            model: the checkpoint that the index was made with, if it has moved since.
            device: where the model runs; the first accelerator by default.
            verify: compare the files of a folder with their checksums.
            embedder: the model, if it is loaded already; then `model` and `device` do not count.

        Raises:
            FileNotFoundError: if there is no such index.
            ValueError: if it is damaged, or none of this package.
        """
        name = os.fspath(path)
        if name.startswith(("lancedb:", "qdrant:")):
            from siglip_hf.search.vector_db import open_table  # needs the extra of its database

            return cls(open_table(name), model=model, device=device, embedder=embedder)
        return cls(IndexFolder(path, verify=verify), model=model, device=device, embedder=embedder)

    def __len__(self) -> int:
        """Rows that can be found."""
        return len(self.backend)

    def __repr__(self) -> str:
        """Size, what is indexed, the kind of index, and the model."""
        model = self.origin.model
        model = Path(model).name if os.path.isabs(model) else model
        return f"SearchIndex({len(self):,} {self.origin.content}s, {self.backend.kind}, {model})"

    @property
    def origin(self) -> Origin:
        """The model and the kind of content that the index was made with."""
        return self.backend.origin

    @property
    def embedder(self) -> SiglipEmbedder:
        """The model that makes vectors of queries.

        Raises:
            ValueError: if it cannot be loaded, or is not the one that the index was made with.
        """
        if self._embedder is None:
            self._embedder = load_embedder(self.origin, self._model, self._device)
        return self._embedder

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        not_text: str | None = None,
        *,
        k: int = 10,
        path_filter: str | None = None,
    ) -> list[Hit]:
        """The k best rows for a query.

        A text and a picture together: each pulls as strongly as the other. Cosines between pictures vary much more than
        those between texts and pictures, so each part is measured in the spread of its own cosines over the index.

        Args:
            text: what it should show.
            image: a picture that it should be like: a path, a PIL image, or whatever else `load_picture` takes.
            not_text: what it should not show; beside a text or a picture.
            k: how many.
            path_filter: only rows whose path or id matches this pattern; `*` also stands for slashes.

        Returns:
            Up to k hits, highest cosine first.

        Raises:
            PictureError: if the picture cannot be read.
            ValueError: if there is nothing to look for, k is below 1, or the model is not that of the index.
        """
        (hits,) = self.search_many([Query(text, image, not_text)], k=k, path_filter=path_filter)
        return hits

    def search_many(self, queries: Sequence[Query], *, k: int = 10, path_filter: str | None = None) -> list[list[Hit]]:
        """As `search`, for many queries at once: the model and the index work in batches.

        Args:
            queries: what to look for.
            k: hits for each.
            path_filter: as for `search`.

        Returns:
            The hits of each query.

        Raises:
            ValueError: for a query without a text or a picture, and for a `k` below 1.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        for query in queries:
            if not (query.text and query.text.strip()) and query.image is None:
                raise ValueError(f"nothing to look for in {query}: give a text or a picture.")
        if not queries:
            return []
        texts, images = self._embed_texts(queries), self._embed_images(queries)
        return self.search_embedded(queries, texts, images, k=k, path_filter=path_filter)

    def search_embedded(
        self,
        queries: Sequence[Query],
        texts: dict[str, np.ndarray],
        images: Sequence[np.ndarray | None],
        *,
        k: int = 10,
        path_filter: str | None = None,
    ) -> list[list[Hit]]:
        """As `search_many`, for a caller that has embedded the queries with this index's model.

        Args:
            queries: one or more; of `image` only whether it is there counts.
            texts: (D,) of each `text` and `not_text`.
            images: (D,) of each query's picture, or None.
            k: hits for each.
            path_filter: as for `search`.
        """
        vectors = np.stack([self._combined(query, texts, images[i]) for i, query in enumerate(queries)])  # (q, D)
        found = self.backend.neighbours(vectors, k, path_filter)
        return [
            self._hits(near, vectors[i], self._other_side(queries[i], texts, images[i])) for i, near in enumerate(found)
        ]

    def _embed_texts(self, queries: Sequence[Query]) -> dict[str, np.ndarray]:
        wanted = list(dict.fromkeys(text for query in queries for text in (query.text, query.not_text) if text))
        return dict(zip(wanted, self.embedder.embed_texts(wanted), strict=True)) if wanted else {}

    def _embed_images(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        pictures = [query.image for query in queries if query.image is not None]
        vectors = iter(self.embedder.embed_images(pictures) if pictures else ())
        return [None if query.image is None else next(vectors) for query in queries]

    def _combined(self, query: Query, texts: dict[str, np.ndarray], image: np.ndarray | None) -> np.ndarray:
        parts = [(texts[query.text], 1.0)] if query.text else []
        parts += [(image, 1.0)] if image is not None else []
        parts += [(texts[query.not_text], -NOT_WEIGHT)] if query.not_text else []
        if len(parts) == 1:
            return parts[0][0]
        if self._sample is None:
            self._sample = self.backend.sample(_SPREAD_SAMPLE)
        spreads = [max(float((self._sample @ vector).std()), 1e-3) for vector, _ in parts]
        total = sum(weight / spread * vector for (vector, weight), spread in zip(parts, spreads, strict=True))
        return np.asarray(total / np.linalg.norm(total), np.float32)

    def _other_side(self, query: Query, texts: dict[str, np.ndarray], image: np.ndarray | None) -> np.ndarray | None:
        """The part of the query that the model gives a probability for: words for pictures, a picture for words."""
        if self.origin.content == "text":
            return image
        return texts[query.text] if query.text else None

    def _hits(self, near: Neighbours, vector: np.ndarray, other_side: np.ndarray | None) -> list[Hit]:
        cosines = exact_cosines(near.vectors, vector)  # (n,)
        probabilities: list[float | None] = [None] * len(cosines)
        if other_side is not None:
            probabilities = self.embedder.probability(exact_cosines(near.vectors, other_side)).tolist()
        names = (near.rows[name].to_pylist() for name in ("id", "path", "text"))
        return [
            Hit(id_, path, float(cosine), probability, text)
            for id_, path, text, cosine, probability in zip(*names, cosines, probabilities, strict=True)
        ]


def load_embedder(origin: Origin, model: str | None = None, device: str | None = None) -> SiglipEmbedder:
    """The model that vectors were made with.

    Args:
        origin: what the vectors are.
        model: where the checkpoint is now; where it was by default.
        device: where it runs.

    Raises:
        ValueError: if it cannot be loaded, or has other weights.
    """
    from siglip_hf.data.embedder import SiglipEmbedder

    try:
        # In float32: the temperature and the bias, rounded to bfloat16, would move a probability by some percent.
        embedder = SiglipEmbedder(model or origin.model, device=device, dtype="float32")
    except (OSError, ValueError) as error:
        hint = "" if model or device else " If it has moved, say where it is (--model)."
        raise ValueError(f"the index was made with {origin.model}: {str(error).rstrip('.')}.{hint}") from error
    check_weights(embedder, origin, model)
    return embedder


def check_weights(embedder: SiglipEmbedder, origin: Origin, model: str | None = None) -> None:
    """Makes sure that vectors were made with a model.

    Raises:
        ValueError: if not.
    """
    weights = embedder.model_sha256
    if weights != origin.model_sha256:
        raise ValueError(
            f"{model or embedder.name} ({weights[:12]}) does not have the weights that the index was made "
            f"with, {origin.model} ({origin.model_sha256[:12]}), so their vectors cannot be compared. Give that model "
            "(--model), or build the index again."
        )
