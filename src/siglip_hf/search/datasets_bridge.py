"""Embeddings as a column of a `datasets.Dataset`, for its own FAISS search (`get_nearest_examples`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from siglip_hf.extras import missing
from siglip_hf.preprocessing.image_intake import looks_like_picture_source

if TYPE_CHECKING:
    from datasets import Dataset

    from siglip_hf.data.embedder import SiglipEmbedder


def add_embeddings(
    dataset: Dataset,
    column: str,
    *,
    embedder: SiglipEmbedder | None = None,
    kind: Literal["image", "text"] | None = None,
    output_column: str = "embeddings",
    batch_size: int = 64,
) -> Dataset:
    """A dataset with one more column: the embedding of each picture or text, of length 1.

    The work is one `Dataset.map` in batches, so that it is cached as all maps are, and computed again when the dataset,
    the model or the column changes.

    Args:
        dataset: the dataset; not a `DatasetDict` (call this for each split) and not a stream.
        column: pictures (an `Image` feature, or paths) or texts.
        embedder: the model; the embedded checkpoint by default.
        kind: what the column holds; by default seen from its type, and for strings from the first one.
        output_column: name of the new column; one of that name is replaced.
        batch_size: rows read together; the forward is of the embedder's batch size.

    Returns:
        A new dataset. The column holds float32 lists of the embedder's dimension.

    Raises:
        ImportError: if `datasets` is not installed.
        PictureError: for the first picture that cannot be read.
        ValueError: if there is no such column, it holds neither, or a text is blank.

    Examples:
        >>> from datasets import Dataset
        >>> from siglip_hf.search import SiglipEmbedder, add_embeddings
        >>> embedder = SiglipEmbedder()
        >>> dataset = Dataset.from_dict({"image": ["drawings/cat.png", "drawings/guitar.png"]})
        >>> dataset = add_embeddings(dataset, "image", embedder=embedder)
        >>> dataset = dataset.add_faiss_index("embeddings")
        >>> dataset.get_nearest_examples("embeddings", embedder.embed_texts("a guitar")[0], k=1).examples["image"]
        ['drawings/guitar.png']
    """
    from siglip_hf.data.embedder import SiglipEmbedder

    try:
        import datasets
    except ImportError as error:
        raise missing("this needs `datasets`", "search") from error
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"a {type(dataset).__name__} is no datasets.Dataset; pass one split of it.")
    if column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r}; the dataset has {', '.join(dataset.column_names)}.")
    if not len(dataset):
        raise ValueError("the dataset is empty; there is nothing to embed.")
    kind = kind or _kind(dataset, column)
    model = embedder or SiglipEmbedder(batch_size=batch_size)
    is_image = isinstance(dataset.features[column], datasets.Image)
    # Undecoded, so that pictures are decoded in the embedder's threads, and its errors name them.
    source = dataset.cast_column(column, datasets.Image(decode=False)) if is_image else dataset

    def embed(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        values = list(batch[column])
        return {output_column: model.embed_images(values) if kind == "image" else model.embed_texts(values)}

    features = source.features.copy()
    features[output_column] = datasets.List(datasets.Value("float32"), length=model.dimension)
    result = source.map(
        embed,
        batched=True,
        batch_size=batch_size,
        features=features,
        desc="embedding",
        # The function cannot be told apart by its content, as it holds a whole model: the cache goes by this.
        new_fingerprint=datasets.fingerprint.Hasher.hash(
            (dataset._fingerprint, column, kind, output_column, model.model_sha256, str(model.dtype))
        ),
    )
    return result.cast_column(column, dataset.features[column]) if is_image else result


def _kind(dataset: Dataset, column: str) -> Literal["image", "text"]:
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return "image"
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        first = next((value for value in dataset[column] if value), "")
        return "image" if looks_like_picture_source(first) else "text"
    raise ValueError(f"column {column!r} holds {feature}, neither pictures nor texts; say kind= if it holds pictures.")
