"""Search over HTTP: the library's hits, no paths, an index that is replaced while it is served."""

from __future__ import annotations

import numpy as np
import pytest

from serving_client import ask, png, uri
from siglip_hf.search.query import SearchIndex
from siglip_hf.search.sources_to_index import index_source
from siglip_hf.serving import indexes
from siglip_hf.serving.app import create_app
from siglip_hf.serving.settings import Settings

pytest.importorskip("faiss")


def build(folder, out, checkpoint, count):
    folder.mkdir(exist_ok=True)
    for seed in range(count):
        (folder / f"{seed}.png").write_bytes(png(seed))
    index_source([str(folder)], out, model=str(checkpoint), overwrite=True)


@pytest.fixture(scope="module")
def photos(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    build(folder / "pictures", folder / "photos.idx", checkpoint, 6)
    return folder


@pytest.fixture(scope="module")
def app(embedder, photos):
    return create_app(Settings(indexes={"photos": str(photos / "photos.idx")}), embedder=embedder)


def test_hits_are_the_librarys_without_paths(app, photos, embedder):
    index = SearchIndex.open(photos / "photos.idx", embedder=embedder)
    for question in ({"text": "a red car"}, {"image": png(3)}, {"text": "cat", "image": png(4), "not_text": "house"}):
        expected = index.search(**question, k=3)
        sent = {name: uri(value) if name == "image" else value for name, value in question.items()}
        status, said = ask(app, "/v1/search", {**sent, "k": 3})
        assert status == 200, said
        assert [hit["id"] for hit in said["data"]] == [hit.id for hit in expected]
        np.testing.assert_allclose([hit["cosine"] for hit in said["data"]], [hit.cosine for hit in expected], atol=1e-5)
        assert [hit["probability"] is None for hit in said["data"]] == [hit.probability is None for hit in expected]
        assert str(photos) not in str(said)
    assert said["index"] == "photos"


def test_an_upload_and_a_filter(app):
    status, said = ask(app, "/v1/search", files={"image": ("a.png", png(2))}, data={"k": "2", "filter": "*2.png"})
    assert status == 200, said
    assert [hit["id"] for hit in said["data"]] == ["2.png"]


def test_indexes_are_listed(app):
    assert ask(app, "/v1/indexes")[1]["data"] == [{"name": "photos", "rows": 6, "content": "image"}]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"text": "a", "index": "other"}, 404, "'other' is not there; the indexes are: photos"),
        ({}, 400, "nothing to look for"),
        ({"text": uri(png())}, 400, "give it as image"),
        ({"text": "a", "k": 1001}, 400, "k: input should be less than"),
        ({"image": [uri(png()), uri(png())]}, 400, "image holds 2 pictures"),
        ({"text": "a", "filter": "*" * 501}, 400, "filter"),
    ],
)
def test_mistakes(app, body, status, words):
    got, said = ask(app, "/v1/search", body)
    assert got == status, said
    assert words in said["detail"]


def test_a_replaced_index_is_opened_again_and_a_broken_one_is_not(embedder, checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(indexes, "LOOK_AGAIN", 0.0)
    out = tmp_path / "photos.idx"
    build(tmp_path / "pictures", out, checkpoint, 2)
    app = create_app(Settings(indexes={"photos": str(out)}), embedder=embedder)

    def found():
        status, said = ask(app, "/v1/search", {"text": "cat"})
        assert status == 200, said
        return len(said["data"])

    assert found() == 2
    build(tmp_path / "pictures", out, checkpoint, 4)
    assert found() == 4
    (out / "manifest.json").write_text("{}")
    assert found() == 4
    assert "photos was replaced, and what is there cannot be used" in caplog.text


def test_an_index_of_another_model_is_refused_at_the_start(photos):
    settings = Settings(model=None, dtype="float32", indexes={"photos": str(photos / "photos.idx")})
    import siglip_hf
    from siglip_hf.data.embedder import SiglipEmbedder

    with pytest.raises(ValueError, match="does not have the weights that the index was made"):
        create_app(settings, embedder=SiglipEmbedder(siglip_hf.default_checkpoint(), device="cpu", dtype="float32"))
