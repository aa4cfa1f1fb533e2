"""What every request passes on its way in and out: keys, bytes, time, whether anyone still waits, a line in the log.

An ASGI middleware. The body is read here, whole and counted, so that nothing behind it ever waits for a slow sender.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from siglip_hf.serving.problems import MEDIA_TYPE, Problem, too_busy
from siglip_hf.serving.security import client_of
from siglip_hf.serving.settings import Settings

Message = dict[str, Any]

logger = logging.getLogger(__name__)

#: A client may ask for less time than the server's own limit, in seconds.
TIMEOUT_HEADER = b"x-request-timeout"
#: For whom a door asks another one.
CLIENT_HEADER = b"x-siglip-hf-client"
_OPEN_PATHS = ("/health/live", "/health/ready")
_PATHS = (
    *_OPEN_PATHS,
    *("/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/search", "/v1/indexes", "/v1/models"),
    *("/metrics", "/openapi.json"),
)


class Held:
    """Bytes of the requests that are being answered.

    Attributes:
        bytes: how many there are now.
    """

    def __init__(self, most: int) -> None:
        self.bytes, self._most = 0, most

    def take(self, count: int) -> None:
        """Counts some more.

        Raises:
            Problem: 429, if all together would be too many.
        """
        if self.bytes + count > self._most:
            raise too_busy("the server holds as much as it may; come again in 1 s.", 1)
        self.bytes += count


class Door:
    """The middleware.

    Attributes:
        held: bytes of bodies in memory.
        is_draining: further requests are refused, because the server ends.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        on_answer: Callable[[str, int, float], None] = lambda path, status, seconds: None,
        log: Callable[[Message], None] = lambda entry: None,
        behind_front: bool = False,
    ) -> None:
        """Puts a door in front of an application.

        Args:
            app: the application behind it.
            settings: keys and limits.
            on_answer: called with the path ("other" for one that is not served), the status and the seconds.
            log: called with what is to be logged of a request; nothing of its contents.
            behind_front: requests come from another door, which says for whom, and has asked for keys.
        """
        self.app, self.held = app, Held(settings.limits.held_bytes)
        self.is_draining = False
        self._keys, self._limits = () if behind_front else settings.api_keys, settings.limits
        self._behind_front = behind_front
        self._on_answer, self._log = on_answer, log

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Passage(self, scope, receive, send).run()
        # Nothing here speaks over websockets; uvicorn refuses what is not accepted.


class _Passage:
    """One request on its way."""

    def __init__(self, door: Door, scope: Message, receive: Any, send: Any) -> None:
        self.door, self.scope, self.receive, self._send = door, scope, receive, send
        self.headers = dict(scope["headers"])
        self.path = scope["path"] if scope["path"] in _PATHS else "other"
        self.id = uuid.uuid4().hex[:16]
        self.status = 0
        self.bytes = 0
        self.start = time.monotonic()

    async def run(self) -> None:
        entry: Message = {}
        try:
            await self._pass()
        except Problem as problem:
            await self._refuse(problem)
        except ConnectionError:  # the client has gone
            self.status = self.status or 499
        except Exception as error:  # a fault of ours: all of it into the log, nothing of it into the answer
            logger.exception("request %s failed", self.id)
            entry["fault"] = type(error).__name__
            await self._refuse(
                Problem(500, f"a fault of the server, not of your request; its log has it as {self.id}.")
            )
        finally:
            self.door.held.bytes -= self.bytes
            seconds = time.monotonic() - self.start
            self.door._on_answer(self.path, self.status, seconds)
            self.door._log(
                {
                    "id": self.id,
                    "client": self.scope.get("state", {}).get("client"),
                    "method": self.scope["method"],
                    "path": self.path,
                    "status": self.status,
                    "bytes": self.bytes,
                    "seconds": round(seconds, 4),
                    **entry,
                }
            )

    async def send(self, message: Message) -> None:
        """Passes an answer on, with the id of the request."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.id.encode())]}
        await self._send(message)

    async def _pass(self) -> None:
        self._admit()
        body = await self._body()
        work = asyncio.create_task(self.door.app(self.scope, _replay(body), self.send))
        gone = asyncio.create_task(self._gone())
        try:
            seconds = self._seconds()
            await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif gone.done():
                raise ConnectionError
            else:
                raise Problem(504, f"the answer was not ready after {seconds:g} s.")
        finally:  # work that no client waits for is dropped
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _admit(self) -> None:
        """Lets the request in by what its headers say."""
        client = self.scope.get("client")
        name = client[0] if client else "unknown"
        if self.door._behind_front:
            name = self.headers.get(CLIENT_HEADER, b"").decode("latin-1") or name
        if self.door._keys and self.path not in _OPEN_PATHS:
            known = client_of(self.headers.get(b"authorization", b""), self.door._keys)
            if known is None:
                raise Problem(
                    401, "this server wants a key: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
                )
            name = known
        self.scope.setdefault("state", {})["client"] = name
        if self.door.is_draining and self.path != "/health/live":
            raise Problem(503, "the server is being ended.", {"Retry-After": "1", "Connection": "close"})
        length = self.headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.door._limits.body_bytes:
            raise self._too_large()

    async def _body(self) -> bytes:
        parts = []
        try:
            async with asyncio.timeout(self.door._limits.slow_seconds):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    part = message.get("body", b"")
                    if self.bytes + len(part) > self.door._limits.body_bytes:
                        raise self._too_large()
                    self.door.held.take(len(part))
                    self.bytes += len(part)
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Problem(408, "the request did not arrive in time.", {"Connection": "close"}) from None

    async def _gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def _seconds(self) -> float:
        try:
            wanted = float(self.headers.get(TIMEOUT_HEADER, b"inf"))
        except ValueError:
            wanted = -1.0
        if not wanted > 0:
            raise Problem(400, "X-Request-Timeout must be a number of seconds above 0.")
        return min(wanted, self.door._limits.seconds)

    def _too_large(self) -> Problem:
        most = self.door._limits.body_bytes
        return Problem(
            413, f"the request is larger than {most:,} bytes, the most that is taken.", {"Connection": "close"}
        )

    async def _refuse(self, problem: Problem) -> None:
        if self.status:  # the answer has begun, and cannot be taken back
            return
        body = problem.body()
        headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **problem.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})


def _replay(body: bytes) -> Any:
    """A `receive` for the application: the body, which is here already, and then nothing until it is cancelled."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive
