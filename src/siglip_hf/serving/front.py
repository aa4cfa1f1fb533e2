"""One door before several workers: a request whose worker dies goes to another, so that every one has its answer.

Any request may be sent twice: none changes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from siglip_hf.serving.door import CLIENT_HEADER, Door
from siglip_hf.serving.metrics import CONTENT_TYPE, Metrics, summed
from siglip_hf.serving.problems import MEDIA_TYPE, Problem
from siglip_hf.serving.settings import Settings

Message = dict[str, Any]

#: Workers that a request is given to, one after the other, while they die of whatever; it may be of the request.
ATTEMPTS = 3
_SENT_ON = (b"content-type", b"accept", b"x-request-timeout")
_SENT_BACK = ("content-type", "retry-after", "allow")


class WorkerDied(Exception):
    """A worker ended before it had answered."""


@dataclass(frozen=True)
class Reply:
    """What a worker said."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Workers(Protocol):
    """Who does the work."""

    @property
    def is_ready(self) -> bool:
        """Whether one at least can be asked."""

    async def start(self) -> None:
        """Begins to watch them."""

    async def stop(self) -> None:
        """Ends them."""

    async def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """The answer of one of them.

        Raises:
            WorkerDied: if it ended meanwhile.
        """

    async def ask_all(self, url: str) -> Sequence[bytes]:
        """What each of them has at an address."""


class Relay:
    """The ASGI application behind the front's door."""

    def __init__(self, workers: Workers, metrics: Metrics) -> None:
        self._workers, self._metrics = workers, metrics

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Hands a request on."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        try:
            reply = await self._reply(scope, (await receive())["body"])
        except Problem as problem:
            reply = Reply(problem.status, {**problem.headers, "content-type": MEDIA_TYPE}, problem.body())
        headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        headers.append((b"content-length", str(len(reply.body)).encode()))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    async def _live(self, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._workers.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._workers.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _reply(self, scope: Message, body: bytes) -> Reply:
        path = scope["path"]
        if path == "/health/live" or (path == "/health/ready" and self._workers.is_ready):
            return Reply(200, {"content-type": "application/json"}, b'{"status":"ok"}')
        if path == "/health/ready":
            raise Problem(503, "no worker is ready.", {"Retry-After": "1"})
        if path == "/metrics":
            texts = await self._workers.ask_all("/metrics")
            return Reply(200, {"content-type": CONTENT_TYPE}, summed([self._metrics.text(), *texts]))
        given = dict(scope["headers"])
        headers = {name.decode(): given[name].decode("latin-1") for name in _SENT_ON if name in given}
        headers[CLIENT_HEADER.decode()] = scope["state"]["client"]
        url = scope["raw_path"].decode("latin-1").partition("?")[0]
        for attempt in range(ATTEMPTS):
            try:
                reply = await self._workers.ask(scope["method"], url, headers, body)
            except WorkerDied:
                await asyncio.sleep(0.05 * attempt)
                continue
            return Reply(reply.status, {n: reply.headers[n] for n in _SENT_BACK if n in reply.headers}, reply.body)
        raise Problem(503, f"{ATTEMPTS} workers ended over this request; come again later.", {"Retry-After": "5"})


def create_front(settings: Settings, workers: Workers, log: Callable[[Message], None] = lambda entry: None) -> Door:
    """An ASGI application that looks at keys and limits, and has the work done by others.

    Args:
        settings: keys and limits.
        workers: who does it; they run `create_app(settings, behind_front=True)`.
        log: as of `create_app`.
    """
    metrics = Metrics()
    return Door(Relay(workers, metrics), settings, metrics.on_answer, log)
