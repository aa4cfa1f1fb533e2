"""Queries: words, pictures, both, and what they should not be; with a model whose vectors are known."""

import fnmatch
import re

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")

import siglip_hf
from search_data import rows
from siglip_hf.search import query as query_module
from siglip_hf.search.backend import Origin, glob_to_regex
from siglip_hf.search.build import build_index
from siglip_hf.search.query import NOT_WEIGHT, Query, SearchIndex, load_embedder

AXES = np.eye(4, dtype=np.float32)


def unit(*numbers):
    return np.array(numbers, np.float32) / np.linalg.norm(numbers)


TEXTS = {"red": AXES[0], "car": AXES[1], "night": AXES[2], "red car": unit(1, 1, 0, 0)}


class Words:
    """Stands for a model: texts are axes of a space of 4 dimensions, pictures are vectors already."""

    model_sha256 = "0" * 64

    def probability(self, cosines):
        return 1 / (1 + np.exp(2 - cosines * np.exp(1.5)))

    def embed_texts(self, texts):
        return np.stack([TEXTS[text] for text in texts])

    def embed_images(self, pictures):
        return np.stack(pictures)


VECTORS = np.stack([unit(1, 0, 0, 0), unit(1, 1, 0, 0), unit(1, 0, 1, 0), unit(0, 1, 1, 0), unit(0.1, 0.1, 0.1, 1)])


def opened(tmp_path, content="image", texts=None):
    origin = Origin("a model", Words.model_sha256, 4, content)
    build_index(origin, [(rows(range(5), texts), VECTORS)], tmp_path / "idx")
    index = SearchIndex.open(tmp_path / "idx")
    index._embedder = Words()
    return index


@pytest.fixture
def index(tmp_path):
    return opened(tmp_path)


def numbers(hits):
    return [int(re.search(r"(\d+)\.png", hit.id)[1]) for hit in hits]


def test_the_index_is_a_public_name(index):
    assert siglip_hf.SearchIndex is SearchIndex
    assert len(index) == 5
    assert index.origin.dimension == 4


@pytest.mark.parametrize(("model", "shown"), [("google/siglip", "google/siglip"), ("/data/checkpoints/tuned", "tuned")])
def test_repr_tells_size_content_kind_and_model(tmp_path, model, shown):
    build_index(Origin(model, "0" * 64, 4, "text"), [(rows(range(5)), VECTORS)], tmp_path / "idx")
    assert repr(SearchIndex.open(tmp_path / "idx")) == f"SearchIndex(5 texts, flat, {shown})"


def test_words_find_pictures_with_cosine_and_probability(index):
    hits = index.search("red car", k=3)
    assert numbers(hits)[0] == 1
    assert hits[0].path == "/pictures/odd/000001.png"
    assert hits[0].cosine == pytest.approx(1, abs=1e-3)
    for hit in hits:
        logit = hit.cosine * np.exp(1.5) - 2
        assert hit.probability == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)


def test_between_pictures_there_is_no_probability(index):
    hits = index.search(image=VECTORS[4], k=2)
    assert numbers(hits)[0] == 4
    assert hits[0].probability is None


def test_in_an_index_of_texts_the_picture_gives_the_probability(tmp_path):
    index = opened(tmp_path, "text", ["a", "b", "c", "d", "e"])
    (hit,) = index.search("red car", k=1)
    assert (hit.text, hit.probability) == ("b", None)
    (hit,) = index.search(image=VECTORS[1], k=1)
    assert hit.probability == pytest.approx(1 / (1 + np.exp(2 - np.exp(1.5))), abs=2e-3)


def test_a_picture_and_words_pull_alike(index):
    hits = index.search("night", AXES[0], k=5)
    assert numbers(hits)[0] == 2  # red and at night
    # By the definition: each part in the spread of its cosines over the index.
    stored = VECTORS.astype(np.float16).astype(np.float32)
    total = AXES[2] / (stored @ AXES[2]).std() + AXES[0] / (stored @ AXES[0]).std()
    expected = stored @ (total / np.linalg.norm(total))
    np.testing.assert_allclose([hit.cosine for hit in hits], np.sort(expected)[::-1], atol=1e-5)
    # The probability is that of the words.
    logit = (stored[2] @ AXES[2]) * np.exp(1.5) - 2
    assert hits[0].probability == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


def test_what_it_should_not_be_goes_down(index):
    assert set(numbers(index.search("red", k=3))) == {0, 1, 2}
    hits = index.search("red", not_text="car", k=5)
    assert numbers(hits)[:2] == [0, 2]
    assert numbers(hits).index(1) > 1
    stored = VECTORS.astype(np.float16).astype(np.float32)
    total = AXES[0] / (stored @ AXES[0]).std() - NOT_WEIGHT * AXES[1] / (stored @ AXES[1]).std()
    assert hits[0].cosine == pytest.approx(max(stored @ (total / np.linalg.norm(total))), abs=1e-5)


def test_many_queries_give_what_each_gives_alone(index):
    queries = [Query("red"), Query("car", not_text="night"), Query(image=VECTORS[3]), Query("car", VECTORS[0])]
    together = index.search_many(queries, k=3)
    for query, hits in zip(queries, together, strict=True):
        alone = index.search(query.text, query.image, query.not_text, k=3)
        assert numbers(alone) == numbers(hits)
        np.testing.assert_allclose([hit.cosine for hit in alone], [hit.cosine for hit in hits], atol=1e-6)
    assert index.search_many([]) == []


def test_paths_are_filtered(index):
    assert numbers(index.search("red", k=5, path_filter="*/odd/*")) == [1, 3]
    assert numbers(index.search("red", k=5, path_filter="even/*")) == [0, 2, 4]  # by id
    assert numbers(index.search("red", k=5, path_filter="*00000[13].png")) == [1, 3]
    assert index.search("red", path_filter="*.jpg") == []


@pytest.mark.parametrize("pattern", ["*.png", "a?c", "[ab]*", "[!a]*", "a.b", "a(b)+", "x y'z", "[", "*[", "ü*", "-a-"])
def test_patterns_match_as_globs_do(pattern):
    names = ["a.png", "apng", "abc", "a/c", "b", "ab", "a.b", "a(b)+", "x y'z", "[", "x[", "über", "a\nc", "-a-", ""]
    ours = re.compile(glob_to_regex(pattern))
    assert [n for n in names if ours.match(n)] == [n for n in names if fnmatch.fnmatchcase(n, pattern)]


def test_a_query_needs_something_to_look_for(index):
    for query in ({}, {"text": " "}, {"not_text": "car"}):
        with pytest.raises(ValueError, match="nothing to look for"):
            index.search(**query)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        index.search("red", k=0)


def test_another_model_is_refused(monkeypatch):
    monkeypatch.setattr("siglip_hf.data.embedder.SiglipEmbedder", lambda *a, **b: Words())
    with pytest.raises(
        ValueError, match=r"b model \(000000000000\) does not have the weights .* a model \(111111111111\)"
    ):
        load_embedder(Origin("a model", "1" * 64, 4, "image"), "b model")
    assert isinstance(load_embedder(Origin("a model", "0" * 64, 4, "image")), Words)


def test_a_model_that_is_gone_is_named():
    with pytest.raises(ValueError, match=r"made with /nowhere/model: .*say where it is \(--model\)"):
        load_embedder(Origin("/nowhere/model", "0" * 64, 4, "image"))


def test_queries_are_described():
    assert str(Query("a cat", "b.png", "night")) == "'a cat' and b.png and not 'night'"
    assert str(Query(image=AXES)) == "a picture"
    assert query_module.NOT_WEIGHT < 1
