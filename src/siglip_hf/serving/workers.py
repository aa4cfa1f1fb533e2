"""Several processes with a model each, on this machine: watched, asked by least work, started again when they end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import httpx2 as httpx

from siglip_hf.parallel import usable_cores
from siglip_hf.serving.app import create_app
from siglip_hf.serving.front import Reply, WorkerDied
from siglip_hf.serving.server import Server, log_as_json
from siglip_hf.serving.settings import Settings

logger = logging.getLogger("siglip_hf.serving")

_LOOK = 0.1  # seconds between looks at the processes
_PATIENCE = 30.0  # seconds for a worker to end


class _Worker:
    """One process, and the way to it."""

    def __init__(self, context: Any, settings: Settings, place: str) -> None:
        self.messages, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(settings, place, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready, self.asked = False, 0
        self._place = place
        self.http: httpx.AsyncClient | None = None

    def look(self) -> str | None:
        """Takes note of what it has said; why it cannot work, if it said so."""
        try:
            if not self.is_ready and self.messages.poll():
                reason = self.messages.recv()
                self.is_ready = reason is None
                return reason
        except EOFError:
            return "it ended before it was ready"
        return None

    @property
    def can_work(self) -> bool:
        """Whether it can be asked."""
        return self.is_ready and self.process.is_alive()

    def client(self) -> httpx.AsyncClient:
        """The way to it; made where it is used, as it belongs to an event loop."""
        if self.http is None:
            # Time and numbers are bounded by the front's door.
            transport = httpx.AsyncHTTPTransport(
                uds=self._place, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
            )
            self.http = httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=None)
        return self.http


class LocalWorkers:
    """The workers.

    Attributes:
        pids: numbers of the processes.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        """Starts all, and waits until they are ready.

        Args:
            settings: what they serve.
            count: how many.

        Raises:
            ValueError: with their reason, if they cannot work.
        """
        self._settings = dataclasses.replace(settings, threads=max(1, usable_cores() // count))
        # Imports everything once, so that a new worker takes no longer than its model; and it is forked from a process
        # without threads, whose locks a child would hold forever.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._folder = tempfile.TemporaryDirectory(prefix="siglip-hf-")  # of this user alone
        self._started = 0
        self._watching: asyncio.Task[None] | None = None
        self._workers = [self._new() for _ in range(count)]
        for worker in self._workers:
            wait([worker.messages])
            if reason := worker.look():
                self._kill()
                raise ValueError(reason)

    @property
    def pids(self) -> list[int]:
        """Their process numbers, those that are not ready too."""
        return [worker.process.pid for worker in self._workers]

    @property
    def is_ready(self) -> bool:
        """Whether one at least can be asked."""
        return any(worker.can_work for worker in self._workers)

    async def start(self) -> None:
        """Begins to watch them."""
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends them, when they have done what they do."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self._kill)

    async def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """The answer of the worker that has least to do; waits for one if none is ready.

        Raises:
            WorkerDied: if it ended meanwhile.
        """
        while not self.is_ready:
            await asyncio.sleep(_LOOK)
        worker = min((one for one in self._workers if one.can_work), key=lambda one: one.asked)
        worker.asked += 1
        try:
            reply = await worker.client().request(method, url, headers=dict(headers), content=body)
        except httpx.TransportError as error:
            raise WorkerDied from error
        finally:
            worker.asked -= 1
        return Reply(reply.status_code, reply.headers, reply.content)

    async def ask_all(self, url: str) -> Sequence[bytes]:
        """What each of them has at an address."""
        clients = [worker.client() for worker in self._workers if worker.can_work]
        replies = await asyncio.gather(*(client.get(url) for client in clients), return_exceptions=True)
        return [reply.content for reply in replies if not isinstance(reply, BaseException)]

    async def _watch(self) -> None:
        while True:
            for number, worker in enumerate(self._workers):
                was_ready = worker.is_ready
                reason = worker.look()
                if not worker.process.is_alive():
                    code = worker.process.exitcode
                    logger.error(
                        "worker %s ended (exit code %s)%s; another one is started",
                        worker.process.pid,
                        code,
                        f": {reason}" if reason else "",
                    )
                    if worker.http is not None:
                        await worker.http.aclose()
                    if not was_ready:  # it may never be, and should not cost a core
                        await asyncio.sleep(1.0)
                    self._workers[number] = await asyncio.to_thread(self._new)
            await asyncio.sleep(_LOOK)

    def _new(self) -> _Worker:
        self._started += 1
        place = str(Path(self._folder.name, f"{self._started}.sock"))
        return _Worker(self._context, self._settings, place)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_PATIENCE)
            worker.process.kill()
        self._folder.cleanup()


def _work(settings: Settings, place: str, messages: Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all; the front ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log_as_json():
        try:
            door = create_app(settings, behind_front=True)
        except (OSError, ValueError) as error:
            messages.send(str(error))
            return
        Server(door, settings.limits.seconds, lambda: messages.send(None), uds=place).run()


def _end_with_parent() -> None:
    """Without the front, however it ended, there is no work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
