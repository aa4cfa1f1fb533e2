"""`siglip_hf.Client`: a server's answers as NumPy arrays, in batches, tried again where trying again may help.

What is asked and how a reply is read is written once, without a network; the two clients only send.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from siglip_hf.extras import missing
from siglip_hf.preprocessing.image_intake import load_picture, read_bytes
from siglip_hf.serving.security import KEYS_VARIABLE

try:
    import httpx2 as httpx
except ImportError as _error:
    raise missing("the client needs httpx2", "serve") from _error

DEFAULT_URL = "http://127.0.0.1:8000"
#: Statuses after which the same request may succeed.
_TRY_AGAIN = (429, 502, 503)
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0


class ServerError(OSError):
    """A server refused a request, or could not be reached.

    Attributes:
        status: the status of HTTP; None if there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Plan:
    """Requests, and what their replies come to."""

    path: str
    bodies: Sequence[Mapping[str, Any] | None]
    finish: Callable[[list[Any]], Any]


class _Asking:
    """Both clients: what is asked."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        batch_size: int = 32,
        transport: Any = None,
    ) -> None:
        """Makes a client; nothing is sent yet.

        Args:
            url: where the server is.
            api_key: its key; the first of the environment's `SIGLIP_HF_API_KEYS` by default.
            timeout: seconds for an answer.
            retries: how often a request is tried again when the server is busy or cannot be reached.
            batch_size: pictures or texts in one request.
            transport: of httpx2, for tests and special networks.

        Raises:
            ValueError: for numbers that cannot be.
        """
        if batch_size < 1 or retries < 0 or timeout <= 0:
            raise ValueError(f"batch_size={batch_size}, retries={retries}, timeout={timeout}: too small.")
        key = api_key or os.environ.get(KEYS_VARIABLE, "").split(",")[0].strip()
        self.url, self.retries, self.batch_size = url.rstrip("/"), retries, batch_size
        self._options = {
            "base_url": self.url,
            "timeout": timeout,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "transport": transport,
        }

    def _embedding(self, items: list[Any]) -> _Plan:
        parts = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return _Plan("/v1/embeddings", [{"input": part, "encoding_format": "base64"} for part in parts], _vectors)

    def _labelling(
        self, pictures: Any, labels: Sequence[str] | str, template: Sequence[str] | str | None, top_k: int | None
    ) -> _Plan:
        items = _pictures(pictures)
        common: dict[str, Any] = {"labels": labels if isinstance(labels, str) else list(labels), "top_k": top_k}
        if template is not None:
            common["template"] = template if isinstance(template, str) else list(template)
        parts = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return _Plan(
            "/v1/classify",
            [{"images": part, **common} for part in parts],
            lambda replies: [row["labels"] for reply in replies for row in reply["data"]],
        )

    def _ranking(self, query: Any, documents: Iterable[Any], top_n: int | None) -> _Plan:
        body = {"query": _item(query), "documents": [_item(document) for document in documents], "top_n": top_n}
        return _Plan("/v1/rerank", [body], lambda replies: replies[0]["results"])

    def _searching(self, text: str | None, image: Any, options: Mapping[str, Any]) -> _Plan:
        body = {"text": text, "image": None if image is None else _picture(image), **options}
        return _Plan("/v1/search", [body], lambda replies: replies[0]["data"])

    def _models(self) -> _Plan:
        return _Plan("/v1/models", [None], lambda replies: replies[0]["data"])

    def _after(self, attempt: int, reply: Any, error: Exception | None) -> float | None:
        """Seconds to wait before the request is sent again; None if its answer is final.

        Raises:
            ServerError: if there will be no good answer.
        """
        if reply is not None and reply.status_code < 400:
            return None
        if attempt < self.retries and (reply is None or reply.status_code in _TRY_AGAIN):
            told = reply.headers.get("Retry-After", "") if reply is not None else ""
            wait = float(told) if told.isdigit() else _FIRST_WAIT * 2**attempt
            # Many clients that were refused together should not all come back together.
            return min(wait, _LONGEST_WAIT) * random.uniform(1.0, 1.25)
        if reply is None:
            raise ServerError(f"{self.url} cannot be reached: {error or 'no answer'}") from error
        try:
            detail = reply.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = "no reason was given"
        raise ServerError(f"{self.url} answered with status {reply.status_code}: {detail}", reply.status_code)


class Client(_Asking):
    """Asks a server of `siglip-hf serve`.

    Examples:
        >>> from siglip_hf import Client
        >>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
        ...     cosines = client.embed_images(["cat.png"]) @ client.embed_texts(["a cat", "a dog"]).T
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends its connections."""
        self._http.close()

    def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """Embeddings of texts: float32 (N, D), each row of length 1.

        Args:
            texts: N texts, or one.

        Raises:
            ServerError: if the server refuses, or cannot be reached.
        """
        return self._do(self._embedding(_texts(texts)))

    def embed_images(self, pictures: Any) -> np.ndarray:
        """Embeddings of pictures: float32 (N, D), each row of length 1.

        Args:
            pictures: one or many: paths, bytes, data URIs, PIL images, arrays. Files go as they are.

        Raises:
            PictureError: for what cannot be read here.
            ServerError: if the server refuses, or cannot be reached.
        """
        return self._do(self._embedding(_pictures(pictures)))

    def classify(
        self,
        pictures: Any,
        labels: Sequence[str] | str,
        *,
        template: Sequence[str] | str | None = None,
        top_k: int | None = 5,
    ) -> list[list[dict[str, Any]]]:
        """The labels of each picture with `cosine`, `logit`, `sigmoid` and `softmax`, best first.

        Args:
            pictures: as for `embed_images`.
            labels: a list, or one string that separates them by commas.
            template: with `{}` for the label; several are averaged.
            top_k: labels per picture; None for all.

        Raises:
            ServerError: if the server refuses, or cannot be reached.
        """
        return self._do(self._labelling(pictures, labels, template, top_k))

    def rerank(self, query: Any, documents: Iterable[Any], *, top_n: int | None = None) -> list[dict[str, Any]]:
        """Documents by how well they fit, best first: `index`, `relevance_score` and `cosine` of each.

        Args:
            query: a text, or a picture that is no string.
            documents: all texts, or all pictures.
            top_n: only the best so many.

        Raises:
            ServerError: if the server refuses, or cannot be reached.
        """
        return self._do(self._ranking(query, documents, top_n))

    def search(self, text: str | None = None, image: Any = None, **options: Any) -> list[dict[str, Any]]:
        """Rows of an index: `id`, `cosine`, `probability`, `text`.

        Args:
            text: what they should show.
            image: a picture that they should be like.
            **options: `index`, `not_text`, `k`, `filter`.

        Raises:
            ServerError: if the server refuses, or cannot be reached.
        """
        return self._do(self._searching(text, image, options))

    def models(self) -> list[dict[str, Any]]:
        """What is served."""
        return self._do(self._models())

    def _do(self, plan: _Plan) -> Any:
        return plan.finish([self._ask(plan.path, body) for body in plan.bodies])

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        for attempt in range(self.retries + 1):
            reply, failed = None, None
            try:
                reply = self._http.request("GET" if body is None else "POST", path, json=body)
            except httpx.TransportError as error:
                failed = error
            wait = self._after(attempt, reply, failed)
            if wait is None:
                assert reply is not None
                return reply.json()
            time.sleep(wait)
        raise AssertionError


class AsyncClient(_Asking):
    """As `Client`, with methods to await. The requests of one call are sent side by side, `concurrency` at once.

    Attributes:
        concurrency: requests on their way at once.

    Examples:
        >>> from siglip_hf import AsyncClient
        >>> async def embed(texts):
        ...     async with AsyncClient("http://127.0.0.1:8000") as client:
        ...         return await client.embed_texts(texts)
    """

    def __init__(self, *arguments: Any, concurrency: int = 8, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.concurrency = concurrency
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends its connections."""
        await self._http.aclose()

    async def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """As `Client.embed_texts`.

        Args:
            texts: N texts, or one.

        Returns:
            float32 (N, D).
        """
        return await self._do(self._embedding(_texts(texts)))

    async def embed_images(self, pictures: Any) -> np.ndarray:
        """As `Client.embed_images`.

        Args:
            pictures: one or many.

        Returns:
            float32 (N, D).
        """
        return await self._do(self._embedding(await asyncio.to_thread(_pictures, pictures)))

    async def classify(
        self,
        pictures: Any,
        labels: Sequence[str] | str,
        *,
        template: Sequence[str] | str | None = None,
        top_k: int | None = 5,
    ) -> list[list[dict[str, Any]]]:
        """As `Client.classify`.

        Args:
            pictures: one or many.
            labels: a list, or one string.
            template: one or several.
            top_k: labels per picture; None for all.
        """
        return await self._do(await asyncio.to_thread(self._labelling, pictures, labels, template, top_k))

    async def rerank(self, query: Any, documents: Iterable[Any], *, top_n: int | None = None) -> list[dict[str, Any]]:
        """As `Client.rerank`.

        Args:
            query: a text or picture.
            documents: all texts, or all pictures.
            top_n: only the best so many.
        """
        return await self._do(await asyncio.to_thread(self._ranking, query, documents, top_n))

    async def search(self, text: str | None = None, image: Any = None, **options: Any) -> list[dict[str, Any]]:
        """As `Client.search`.

        Args:
            text: what rows should show.
            image: a picture that they should be like.
            **options: `index`, `not_text`, `k`, `filter`.
        """
        return await self._do(await asyncio.to_thread(self._searching, text, image, options))

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return await self._do(self._models())

    async def _do(self, plan: _Plan) -> Any:
        places = asyncio.Semaphore(self.concurrency)

        async def ask(body: Mapping[str, Any] | None) -> Any:
            async with places:
                return await self._ask(plan.path, body)

        return plan.finish(list(await asyncio.gather(*map(ask, plan.bodies))))

    async def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        for attempt in range(self.retries + 1):
            reply, failed = None, None
            try:
                reply = await self._http.request("GET" if body is None else "POST", path, json=body)
            except httpx.TransportError as error:
                failed = error
            wait = self._after(attempt, reply, failed)
            if wait is None:
                assert reply is not None
                return reply.json()
            await asyncio.sleep(wait)
        raise AssertionError


def _vectors(replies: Sequence[Any]) -> np.ndarray:
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for reply in replies for row in reply["data"]]
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)


def _texts(texts: str | Iterable[str]) -> list[Any]:
    """Texts as parts, so that one that begins like a data URI is a text nevertheless."""
    values = [texts] if isinstance(texts, str) else list(texts)
    return [{"type": "text", "text": text} for text in values]


def _pictures(pictures: Any) -> list[Any]:
    is_many = isinstance(pictures, list | tuple) or getattr(pictures, "ndim", 0) == 4
    return [_picture(picture) for picture in (pictures if is_many else [pictures])]


def _item(value: Any) -> Any:
    return {"type": "text", "text": value} if isinstance(value, str) else _picture(value)


def _picture(source: Any) -> dict[str, Any]:
    """A picture as a part: the content of a file as it is, anything else as a PNG."""
    if isinstance(source, str | os.PathLike | bytes | dict) or hasattr(source, "read"):
        content = read_bytes(source)
    else:
        file = io.BytesIO()
        load_picture(source).save(file, "PNG")
        content = file.getvalue()
    encoded = base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:application/octet-stream;base64,{encoded}"}}
