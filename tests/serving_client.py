"""Pictures to send, and a way to ask an application without a network."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx2")


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """The file of a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def part(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": uri(content)}}


def client_of(app, **options):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60, **options)


def ask(app, path, json=None, method=None, **options):
    """One request, in a loop of its own: status and what was said."""

    async def request():
        async with client_of(app) as client:
            return await client.request(
                method or ("POST" if json is not None or options else "GET"), path, json=json, **options
            )

    reply = asyncio.run(request())
    return reply.status_code, reply.json() if "json" in reply.headers.get("content-type", "") else reply.text
