"""The client: the library's numbers by way of a server, batches, and patience with a busy one."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
from PIL import Image

import siglip_hf
from serving_client import httpx, png
from siglip_hf.serving import client as module
from siglip_hf.serving.app import create_app
from siglip_hf.serving.client import AsyncClient, Client, ServerError
from siglip_hf.serving.settings import Settings

TEXTS = ["a red car", "cat", "data:a text that begins like a picture"]


@pytest.fixture(scope="module")
def app(embedder):
    return create_app(Settings(), embedder=embedder)


class Through(httpx.BaseTransport):
    """Asks an application without a network, for a client that does not await."""

    def __init__(self, app):
        self.app, self.requests = app, 0

    def handle_request(self, request):
        self.requests += 1
        return asyncio.run(self._answer(request))

    async def _answer(self, request):
        transport = httpx.ASGITransport(self.app)
        again = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
        reply = await transport.handle_async_request(again)
        return httpx.Response(reply.status_code, headers=reply.headers, content=await reply.aread())


@pytest.fixture
def pictures(tmp_path):
    """A path, a string with one, bytes, a PIL image, an array."""
    (tmp_path / "a.png").write_bytes(png(1))
    image = Image.open(tmp_path / "a.png").convert("RGB")
    return [tmp_path / "a.png", os.fspath(tmp_path / "a.png"), png(1), image, np.asarray(image)]


def test_numbers_are_the_librarys(app, embedder, pictures):
    transport = Through(app)
    with Client(batch_size=2, transport=transport) as client:
        np.testing.assert_allclose(client.embed_texts(TEXTS), embedder.embed_texts(TEXTS), atol=1e-5)
        assert transport.requests == 2
        expected = np.repeat(embedder.embed_images([png(1)]), 5, axis=0)
        np.testing.assert_allclose(client.embed_images(pictures), expected, atol=1e-5)
        assert client.embed_images(png(1)).shape == (1, 32)
        scored = client.classify(pictures[:3], "cat, dog", top_k=1)
        assert len(scored) == 3
        assert len({row["label"] for (row,) in scored}) == 1
        ranked = client.rerank("cat", ["dog", "cat"], top_n=1)
        assert ranked[0]["index"] == 1
        assert client.models()[0]["dimensions"] == 32
        with pytest.raises(ServerError, match="status 404: index=None is not there") as refused:
            client.search("cat")
        assert refused.value.status == 404


def test_the_awaited_client_says_the_same(app, embedder):
    async def scenario():
        async with AsyncClient(batch_size=1, transport=httpx.ASGITransport(app)) as client:
            texts, images = await asyncio.gather(client.embed_texts(TEXTS), client.embed_images([png(1), png(2)]))
            return texts, images, await client.classify(png(1), ["cat", "dog"]), await client.rerank("a", ["b"])

    texts, images, scored, ranked = asyncio.run(scenario())
    np.testing.assert_allclose(texts, embedder.embed_texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(images, embedder.embed_images([png(1), png(2)]), atol=1e-5)
    assert len(scored[0]) == 2
    assert ranked[0]["index"] == 0


def replies(*statuses, headers=None):
    """A transport that answers with these one after the other, and notes what it was asked."""
    left, seen = list(statuses), []

    def answer(request):
        seen.append(request)
        status = left.pop(0)
        if status is None:
            raise httpx.ConnectError("nobody there")
        return httpx.Response(status, headers=headers, json={"data": [], "detail": "because"})

    return httpx.MockTransport(answer), seen


@pytest.fixture
def waits(monkeypatch):
    """The seconds that a client would have waited."""
    seconds = []
    monkeypatch.setattr(module.time, "sleep", seconds.append)
    return seconds


def test_a_busy_server_is_asked_again_later(waits):
    transport, seen = replies(429, 503, None, 200)
    assert Client(transport=transport).models() == []
    assert len(seen) == 4
    for wait, least in zip(waits, (0.25, 0.5, 1.0), strict=True):
        assert least <= wait <= 1.25 * least


def test_it_waits_as_long_as_it_is_told(waits):
    transport, _ = replies(429, 200, headers={"Retry-After": "7"})
    Client(transport=transport).models()
    assert 7 <= waits[0] <= 7 * 1.25


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 504])
def test_what_would_fail_again_is_not_tried_again(waits, status):
    transport, seen = replies(status)
    with pytest.raises(ServerError, match=f"status {status}: because"):
        Client(transport=transport).models()
    assert (len(seen), waits) == (1, [])


def test_patience_ends(waits):
    transport, seen = replies(*[None] * 3)
    with pytest.raises(ServerError, match="cannot be reached: nobody there"):
        Client(transport=transport, retries=2).models()
    assert len(seen) == 3


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("SIGLIP_HF_API_KEYS", "from-the-environment, other")
    for options, key in (({}, "from-the-environment"), ({"api_key": "given"}, "given")):
        transport, seen = replies(200)
        siglip_hf.Client(transport=transport, **options).models()
        assert seen[0].headers["Authorization"] == f"Bearer {key}"


def test_numbers_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="batch_size=0"):
        Client(batch_size=0)
