"""What the endpoints answer: OpenAI's shapes, the library's numbers, and sentences for mistakes."""

from __future__ import annotations

import base64

import numpy as np
import pytest

import siglip_hf
from serving_client import ask, part, png, uri
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline
from siglip_hf.serving.app import create_app
from siglip_hf.serving.settings import Limits, Settings

CLOSE = {"atol": 1e-5, "rtol": 0}
LIMITS = Limits(inputs=40, characters=100, labels=5, templates=3, results=30, pixels=4000, body_bytes=200_000)


@pytest.fixture(scope="module")
def app(embedder):
    return create_app(Settings(limits=LIMITS), embedder=embedder)


def embed(app, value, **fields):
    status, said = ask(app, "/v1/embeddings", {"input": value, **fields})
    assert status == 200, said
    assert [row["index"] for row in said["data"]] == list(range(len(said["data"])))
    return said, np.array([row["embedding"] for row in said["data"]], np.float32)


def test_texts_have_openai_shapes_and_the_librarys_numbers(app, embedder):
    texts = ["a red car", "CAT", "a photo of the big green house in the moon and the sun and the tree"]
    said, rows = embed(app, texts, model="tiny-siglip", user="someone")
    np.testing.assert_allclose(rows, embedder.embed_texts(texts), **CLOSE)
    assert set(said) == {"object", "data", "model", "usage"}
    assert (said["object"], said["model"]) == ("list", "tiny-siglip")
    assert set(said["data"][0]) == {"object", "index", "embedding"}
    tokenizer = embedder.processor.tokenizer
    tokens = sum(min(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1, 16) for text in texts)
    assert said["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_one_string_is_a_list_of_one(app, embedder):
    _, rows = embed(app, "a red car")
    np.testing.assert_allclose(rows, embedder.embed_texts("a red car"), **CLOSE)


def test_base64_is_little_endian_float32(app, embedder):
    said, _ = ask(app, "/v1/embeddings", {"input": "cat", "encoding_format": "base64"})[1], None
    row = np.frombuffer(base64.b64decode(said["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(row, embedder.embed_texts("cat")[0], **CLOSE)


def test_texts_and_pictures_mix_in_order(app, embedder):
    """Data URIs, three ways to write a part, texts between them, more than a batch."""
    pictures = [png(seed, (30 + seed, 40)) for seed in range(10)]
    value = ["cat", part(pictures[0]), uri(pictures[1]), {"type": "text", "text": "dog"}, {"image": uri(pictures[2])}]
    value += [{"type": "input_image", "image_url": uri(content)} for content in pictures[3:]] + ["bird"]
    said, rows = embed(app, value)
    images, texts = embedder.embed_images(pictures), embedder.embed_texts(["cat", "dog", "bird"])
    expected = [texts[0], images[0], images[1], texts[1], images[2], *images[3:], texts[2]]
    np.testing.assert_allclose(rows, np.stack(expected), **CLOSE)
    assert said["usage"]["prompt_tokens"] == 6


def test_classify_gives_the_pipelines_scores(app, embedder):
    labels, templates = ["cat", "red_car", "house"], ["a photo of {}.", "{}"]
    pictures = [png(1), png(2)]
    fields = {"images": [uri(pictures[0]), part(pictures[1])], "labels": labels, "template": templates, "top_k": 2}
    status, said = ask(app, "/v1/classify", fields)
    assert status == 200, said
    pipeline = SiglipZeroShotImageClassificationPipeline(
        task="zero-shot-image-classification",
        model=embedder.model,
        tokenizer=embedder.processor.tokenizer,
        image_processor=embedder.processor.image_processor,
    )
    expected = pipeline(pictures, labels, hypothesis_template=templates, named_scores=True, top_k=2)
    assert [row["index"] for row in said["data"]] == [0, 1]
    for row, wanted in zip(said["data"], expected, strict=True):
        assert [label["label"] for label in row["labels"]] == [label["label"] for label in wanted]
        for name in ("cosine", "logit", "sigmoid", "softmax"):
            np.testing.assert_allclose(
                [label[name] for label in row["labels"]], [label[name] for label in wanted], atol=1e-4
            )
    assert app.app.state.service.labels.bank.missing(labels, templates) == {}


def test_rerank_across_and_within_kinds(app, embedder):
    texts, picture = ["cat", "dog", "house"], png(3)
    _, said = ask(app, "/v1/rerank", {"query": part(picture), "documents": texts, "return_documents": True, "top_n": 2})
    cosines = embedder.embed_texts(texts) @ embedder.embed_images([picture])[0]
    best = np.argsort(-cosines)[:2]
    assert [row["index"] for row in said["results"]] == best.tolist()
    assert [row["document"] for row in said["results"]] == [texts[place] for place in best]
    np.testing.assert_allclose([row["cosine"] for row in said["results"]], cosines[best], **CLOSE)
    scores = [row["relevance_score"] for row in said["results"]]
    np.testing.assert_allclose(scores, embedder.probability(cosines)[best], atol=1e-4)
    _, said = ask(app, "/v1/rerank", {"query": "cat", "documents": ["house", "cat"]})
    assert said["results"][0]["index"] == 1
    assert said["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)


def test_uploads(app, embedder):
    files = [("image", ("a.png", png(1))), ("image", ("b.png", png(2)))]
    status, said = ask(app, "/v1/embeddings", files=files, data={"encoding_format": "float"})
    assert status == 200, said
    rows = [row["embedding"] for row in said["data"]]
    np.testing.assert_allclose(rows, embedder.embed_images([png(1), png(2)]), **CLOSE)
    status, said = ask(app, "/v1/classify", files=files[:1], data={"labels": "cat, dog", "top_k": "1"})
    assert status == 200, said
    assert len(said["data"][0]["labels"]) == 1


def test_models_and_health(app):
    model = {"id": "tiny-siglip", "object": "model", "created": 0, "owned_by": "siglip-hf", "dimensions": 32}
    assert ask(app, "/v1/models") == (200, {"object": "list", "data": [model]})
    assert ask(app, "/v1/models/tiny-siglip") == (200, model)
    assert ask(app, "/health/live") == ask(app, "/health/ready") == (200, {"status": "ok"})
    assert ask(app, "/v1/indexes") == (200, {"object": "list", "data": []})


MISTAKES = [
    ("/v1/embeddings", {"input": [1, 2, 3]}, 400, "numbers of tokens"),
    ("/v1/embeddings", {"input": [[1, 2], [3]]}, 400, "numbers of tokens"),
    ("/v1/embeddings", {"input": []}, 400, "input is empty"),
    ("/v1/embeddings", {}, 400, "input is missing"),
    ("/v1/embeddings", {"input": "  "}, 400, "is not a text"),
    ("/v1/embeddings", {"input": ["cat", 5]}, 400, "input[1] is a int"),
    ("/v1/embeddings", {"input": ["cat", {"type": "audio"}]}, 400, "input[1] is a content part"),
    ("/v1/embeddings", {"input": "cat", "dimensions": 5}, 400, "dimensions=5"),
    ("/v1/embeddings", {"input": "cat", "model": "gpt"}, 404, "'gpt' is not served here"),
    ("/v1/embeddings", {"input": "cat", "inptu": 1}, 400, "inptu is not a field"),
    ("/v1/embeddings", {"input": ["cat"] * 41}, 400, "41 entries; at most 40"),
    ("/v1/embeddings", {"input": "x" * 101}, 400, "101 characters"),
    (
        "/v1/embeddings",
        {"input": ["cat", "data:image/png;base64,AAAA"]},
        400,
        "picture 1 (as it was sent): not a picture",
    ),
    ("/v1/embeddings", {"input": "data:image/png;base64,&&"}, 400, "not base64"),
    ("/v1/embeddings", {"input": uri(png(0, (100, 41)))}, 400, "100 x 41 pixels; at most 0.004 million"),
    ("/v1/embeddings", {"input": {"image_url": "http://127.0.0.1/a.png"}}, 400, "addresses are not fetched"),
    ("/v1/classify", {"images": "/etc/passwd", "labels": "a"}, 400, "not base64"),
    ("/v1/classify", {"images": [{"text": "cat"}], "labels": "a"}, 400, "images may hold pictures only"),
    ("/v1/classify", {"images": uri(png()), "labels": []}, 400, "hold no label"),
    ("/v1/classify", {"images": uri(png()), "labels": list("abcdef")}, 400, "6 labels are too many"),
    ("/v1/classify", {"images": uri(png()), "labels": "a", "template": "no place"}, 400, "has no single '{}'"),
    ("/v1/classify", {"images": uri(png()), "labels": "a", "top_k": 0}, 400, "top_k: input should be greater"),
    ("/v1/rerank", {"query": ["a", "b"], "documents": ["a"]}, 400, "query holds 2 entries"),
    ("/v1/rerank", {"query": "a", "documents": ["a", part(png())]}, 400, "texts and pictures"),
    ("/v1/search", {"text": "a"}, 404, "the indexes are: none"),
    ("/nothing", {}, 404, "there is nothing here"),
    ("/v1/models", {}, 405, "POST is not what this address takes"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), MISTAKES)
def test_mistakes_are_told_as_problem_details(app, path, body, status, words):
    got, said = ask(app, path, body)
    assert got == status, said
    assert words in said["detail"]
    assert (said["type"], said["status"], said["error"]["message"]) == ("about:blank", status, said["detail"])
    assert "/" not in said["detail"].replace("data:image/png;base64", "").replace("application/json", "")


def test_bodies_that_are_no_json(app):
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b'{"input": "\\ud800"}'):
        status, said = ask(app, "/v1/embeddings", content=content)
        assert (status, said["title"]) == (400, "Bad Request"), said
    status, said = ask(app, "/v1/embeddings", content=b"a", headers={"Content-Type": "text/plain"})
    assert (status, said["detail"][:33]) == (415, "the content type text/plain is no")


def test_formats_that_start_other_programs_are_refused(app):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    status, said = ask(app, "/v1/embeddings", {"input": uri(postscript)})
    assert (status, said["detail"]) == (
        400,
        "picture 0 (as it was sent): the format EPS is not taken; send a JPEG, PNG or WebP",
    )


def test_the_description_has_bodies_and_examples_that_work(app):
    _, described = ask(app, "/openapi.json")
    for path in ("/v1/embeddings", "/v1/classify", "/v1/rerank"):
        body = described["paths"][path]["post"]["requestBody"]["content"]
        assert set(body) == {"application/json", "multipart/form-data"}
        for example in body["application/json"]["examples"].values():
            assert ask(app, path, example["value"])[0] == 200
    text = str(described)
    for name in [word.split("'")[0] for word in text.split("#/components/schemas/")[1:]]:
        assert name in described["components"]["schemas"]


def test_metrics_count(app):
    ask(app, "/v1/embeddings", {"input": "cat"})
    _, text = ask(app, "/metrics")
    assert 'siglip_requests_total{path="/v1/embeddings",status="200"}' in text
    assert 'siglip_items_total{lane="pictures"}' in text


def test_naflex_pictures_of_any_shape_share_a_batch():
    """SigLIP 2 beside SigLIP: patches with masks, another tokenizer."""
    embedder = SiglipEmbedder(siglip_hf.naflex_checkpoint(), device="cpu", dtype="float32", batch_size=8, workers=2)
    app = create_app(Settings(wait=0.05), embedder=embedder)
    pictures = [png(seed, size) for seed, size in enumerate([(90, 30), (20, 100), (64, 64)])]
    said, rows = embed(app, ["A cat", *map(uri, pictures)])
    np.testing.assert_allclose(rows[0], embedder.embed_texts("A cat")[0], **CLOSE)
    np.testing.assert_allclose(rows[1:], embedder.embed_images(pictures), **CLOSE)
    assert 2 <= said["usage"]["prompt_tokens"] <= 6
    status, said = ask(app, "/v1/classify", {"images": uri(pictures[0]), "labels": "cat, dog"})
    assert (status, len(said["data"][0]["labels"])) == (200, 2)
