"""One queue in front of a tower: batches by size and by time, fair between clients, no work for clients that have gone.

All of it runs in one event loop; only `prepare` and `compute` are called in threads. So there are no locks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from siglip_hf.serving.problems import too_busy

#: Batches that are prepared ahead of the tower: one to go on with while another is filled up.
AHEAD = 2


@dataclass(eq=False)
class _Job:
    """The items of one request."""

    items: Sequence[Any]
    done: asyncio.Future[list[Any]]
    results: list[Any] = field(init=False)
    taken: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.results, self.left = [None] * len(self.items), len(self.items)


@dataclass(frozen=True)
class _Ready:
    """A prepared item: the place in its job, and since when it waits."""

    job: _Job
    index: int
    item: Any
    since: float


class _Turns:
    """Items in turns: client after client, and job after job of each, so that a small one never waits for a large."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[_Job]] = OrderedDict()

    def add(self, client: str, job: _Job) -> None:
        self._clients.setdefault(client, deque()).append(job)

    def next(self) -> tuple[_Job, int] | None:
        """The next item, as its job and place; None if no job that is still waited for has one."""
        while self._clients:
            client, jobs = self._clients.popitem(last=False)
            while jobs:
                job = jobs.popleft()
                if job.done.done():
                    continue
                index = job.taken
                job.taken += 1
                if job.taken < len(job.items):
                    jobs.append(job)
                if jobs:
                    self._clients[client] = jobs
                return job, index
        return None


class Lane:
    """Items on their way through a tower.

    Attributes:
        name: what goes through it, for messages: "pictures".
        pending: items that were taken in and are not answered yet.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[list[Any]], Sequence[Any]],
        computer: Executor,
        *,
        prepare: Callable[[Any], Any] | None = None,
        preparers: Executor | None = None,
        batch_size: int = 32,
        wait: float = 0.002,
        capacity: int = 2048,
        on_batch: Callable[[str, int, float], None] = lambda name, size, seconds: None,
    ) -> None:
        """Makes an empty lane.

        Args:
            name: what goes through it.
            compute: function of up to `batch_size` prepared items that gives as many results.
            computer: where it is called, one batch at a time. Lanes that share an executor of one thread take turns.
            prepare: function of an item, called before; an exception is the answer to the item's job.
            preparers: where that is called.
            batch_size: most items in one call of `compute`.
            wait: seconds that an item waits for others to come.
            capacity: pending items with which no further job is taken.
            on_batch: called with the name, the size and the seconds of each batch.
        """
        self.name, self.pending = name, 0
        self._compute, self._computer = compute, computer
        self._prepare, self._preparers = prepare, preparers
        self._batch_size, self._wait, self._capacity = batch_size, wait, capacity
        self._on_batch = on_batch
        self._turns = _Turns()
        self._ready: deque[_Ready] = deque()
        self._preparing = 0
        self._is_busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_loop: asyncio.AbstractEventLoop | None = None
        self._item_seconds = 0.01  # a running mean, for the time after which to come again
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, items: Sequence[Any], client: str = "") -> list[Any]:
        """Results of items, in their order. Cancelled, it costs nothing more than the batch that runs already.

        Args:
            items: what `prepare`, or else `compute`, takes.
            client: who asks; clients take turns.

        Raises:
            Problem: 429, if too much waits already.
            Exception: of the first item that fails.
        """
        if not items:
            return []
        if self.pending >= self._capacity:
            seconds = min(max(math.ceil(self.pending * self._item_seconds), 1), 60)
            raise too_busy(f"{self.pending} {self.name} are waiting already; come again in {seconds} s.", seconds)
        job = _Job(items, asyncio.get_running_loop().create_future())
        self.pending += len(items)
        self._turns.add(client, job)
        self._advance()
        try:
            return await job.done
        finally:
            self.pending -= job.left
            job.left = 0

    def _advance(self) -> None:
        """Starts whatever can be started."""
        if any(ready.job.done.done() for ready in self._ready):  # no client waits for it; it makes room
            self._ready = deque(ready for ready in self._ready if not ready.job.done.done())
        while len(self._ready) + self._preparing < AHEAD * self._batch_size and (chosen := self._turns.next()):
            job, index = chosen
            if self._prepare is None:
                self._ready.append(_Ready(job, index, job.items[index], time.monotonic()))
            else:
                self._preparing += 1
                self._run(self._prepared(job, index))
        if self._is_busy or not self._ready:
            return
        waited = time.monotonic() - self._ready[0].since
        if len(self._ready) >= self._batch_size or waited >= self._wait:
            self._is_busy = True
            self._run(self._computed([self._ready.popleft() for _ in range(min(self._batch_size, len(self._ready)))]))
        elif self._timer is None or self._timer_loop is not asyncio.get_running_loop():  # of a loop that has ended
            self._timer_loop = asyncio.get_running_loop()
            self._timer = self._timer_loop.call_later(self._wait - waited, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._advance()

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._running.discard)

    async def _prepared(self, job: _Job, index: int) -> None:
        assert self._prepare is not None
        try:
            item = await asyncio.get_running_loop().run_in_executor(self._preparers, self._prepare, job.items[index])
        except Exception as error:
            _fail(job, error)
        else:
            self._ready.append(_Ready(job, index, item, time.monotonic()))
        finally:
            self._preparing -= 1
            self._advance()

    async def _computed(self, batch: list[_Ready]) -> None:
        start = time.monotonic()
        try:
            items = [ready.item for ready in batch]
            results = await asyncio.get_running_loop().run_in_executor(self._computer, self._compute, items)
            seconds = time.monotonic() - start
            self._item_seconds += 0.2 * (seconds / len(batch) - self._item_seconds)
            self._on_batch(self.name, len(batch), seconds)
            for ready, result in zip(batch, results, strict=True):
                self._deliver(ready, result)
        except Exception as error:
            for ready in batch:
                _fail(ready.job, error)
        finally:
            self._is_busy = False
            self._advance()

    def _deliver(self, ready: _Ready, result: Any) -> None:
        job = ready.job
        if job.done.done():
            return
        job.results[ready.index] = result
        job.left -= 1
        self.pending -= 1
        if not job.left:
            job.done.set_result(job.results)


def _fail(job: _Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
