"""Embeddings as a column of a dataset, and FAISS search as `datasets` has it."""

import json
from pathlib import Path

import numpy as np
import pytest

from siglip_hf.search import SiglipEmbedder, add_embeddings

datasets = pytest.importorskip("datasets")
pytest.importorskip("faiss")

PICTURES = Path(__file__).parents[2] / "src" / "siglip_hf" / "apps" / "pictures"
LABELS = json.loads((PICTURES / "labels.json").read_text())


@pytest.fixture(scope="module")
def embedder():
    return SiglipEmbedder(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain():
    return datasets.Dataset.from_dict(
        {"picture": [str(PICTURES / name) for name in LABELS], "label": list(LABELS.values())}
    )


def test_pictures_get_their_embeddings_and_are_found(plain, embedder, tmp_path):
    dataset = plain.cast_column("picture", datasets.Image())
    result = add_embeddings(dataset, "picture", embedder=embedder, batch_size=10)
    assert result.column_names == ["picture", "label", "embeddings"]
    assert result.features["picture"] == dataset.features["picture"]
    expected = embedder.embed_images([str(PICTURES / name) for name in LABELS])
    np.testing.assert_allclose(np.array(result["embeddings"]), expected, atol=1e-5)
    assert result[0]["picture"].size == (160, 160)

    result.add_faiss_index("embeddings")
    query = embedder.embed_images([str(PICTURES / "tiger.png")])[0]
    scores, examples = result.get_nearest_examples("embeddings", query, k=3)
    assert examples["label"][0] == "tiger"
    assert scores[0] == pytest.approx(0, abs=1e-4)
    result.save_faiss_index("embeddings", tmp_path / "pictures.faiss")
    again = result.remove_columns("embeddings")
    again.load_faiss_index("embeddings", tmp_path / "pictures.faiss")
    _, examples = again.get_nearest_examples("embeddings", query, k=3)
    assert examples["label"][0] == "tiger"


def test_paths_and_texts_are_told_apart(plain, embedder):
    few = plain.select(range(4))
    pictures = add_embeddings(few, "picture", embedder=embedder, output_column="a")
    texts = add_embeddings(pictures, "label", embedder=embedder, output_column="b")
    np.testing.assert_allclose(np.array(texts["a"]), embedder.embed_images(few["picture"][:]), atol=1e-5)
    np.testing.assert_allclose(np.array(texts["b"]), embedder.embed_texts(few["label"][:]), atol=1e-5)
    assert texts.features["b"] == datasets.List(datasets.Value("float32"), length=embedder.dimension)
    as_text = add_embeddings(few, "picture", embedder=embedder, kind="text")
    np.testing.assert_allclose(np.array(as_text["embeddings"]), embedder.embed_texts(few["picture"][:]), atol=1e-5)


def test_the_cache_knows_model_and_column(plain, embedder):
    few = plain.select(range(2))
    one, other = (add_embeddings(few, "label", embedder=embedder, output_column=name) for name in ("a", "b"))
    again = add_embeddings(few, "label", embedder=embedder, output_column="a")
    assert one._fingerprint == again._fingerprint != other._fingerprint


def test_what_cannot_be(plain, embedder):
    with pytest.raises(ValueError, match="no column 'image'; the dataset has picture, label"):
        add_embeddings(plain, "image", embedder=embedder)
    with pytest.raises(ValueError, match="a DatasetDict is no"):
        add_embeddings(datasets.DatasetDict(train=plain), "picture", embedder=embedder)
    with pytest.raises(ValueError, match="is empty"):
        add_embeddings(plain.select([]), "picture", embedder=embedder)
    with pytest.raises(ValueError, match="neither pictures nor texts"):
        add_embeddings(datasets.Dataset.from_dict({"n": [1, 2]}), "n", embedder=embedder)
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        add_embeddings(datasets.Dataset.from_dict({"n": ["/nowhere.png"]}), "n", embedder=embedder)
