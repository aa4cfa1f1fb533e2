"""Work in threads: on the pictures of a batch side by side, and ahead of the tower that computes on them.

Decoding and resizing release Python's lock, so that threads help.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

# Devices with streams for which PyTorch pins memory.
_PINNED = {"cuda", "xpu"}

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

#: Pixels that readers hold decoded at once, in all threads together: 256 MB, or twice that while they are converted.
#: One larger picture is decoded alone, at most 179 million pixels by Pillow's own limit: 716 MB.
HELD_PIXELS = 64_000_000
#: Pictures of fewer pixels are not counted.
SMALL_PIXELS = 2_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.is_file():
        limit, _, period = _CPU_QUOTA.read_text().strip().partition(" ")
        if limit.isdigit() and period.isdigit():
            cores = min(cores, math.ceil(int(limit) / int(period)))
    return max(1, cores)


def copies_by_itself(device: torch.device) -> bool:
    """Whether a device copies from and to pinned memory of the host while it computes and the host goes on."""
    return device.type in _PINNED


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; the host does not wait for the copy where the device can do it by itself."""
    by_itself = copies_by_itself(device)
    if by_itself and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()  # from other memory it would wait; PyTorch keeps it until it has been copied
    return tensor.to(device, non_blocking=by_itself)


def one_torch_thread() -> None:
    """Lets torch use one thread in the thread that calls this, for the rest of its life; all others keep theirs.

    `torch.set_num_threads` would also set the number that threads begin with which start later, anywhere.
    """
    torch.get_num_threads()  # a thread's first use of torch sets its number, and would undo what came before
    _openmp().limit(limits=1)


@functools.cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


class PixelBudget:
    """Bounds the pixels that all threads together hold decoded, so that large pictures wait for each other.

    A thread opens a block with `bounded`, decodes a picture in it, and makes it small. The picture's pixels count from
    `hold`, which the decoder calls when it has read the size, until the block ends or `release` is called.

    Attributes:
        limit: Pixels held at once; a picture of more is decoded alone.
        largest: Pixels of the largest picture that is decoded at all; None leaves that to Pillow.
    """

    def __init__(self, limit: int = HELD_PIXELS) -> None:
        self.limit = limit
        self.largest: int | None = None
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # what other threads of the parent held is not held here

    def _reset(self) -> None:
        self._held = 0
        self._changed = threading.Condition()
        self._mine = threading.local()

    @contextlib.contextmanager
    def at_most(self, pixels: int | None) -> Iterator[None]:
        """Pictures of more pixels are refused in the block, undecoded; None changes nothing."""
        before = self.largest
        self.largest = before if pixels is None else pixels
        try:
            yield
        finally:
            self.largest = before

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Counts the pictures that this thread decodes in the block."""
        if hasattr(self._mine, "pixels"):  # the outer block counts them
            yield
            return
        self._mine.pixels = 0
        try:
            yield
        finally:
            self.release()
            del self._mine.pixels

    def hold(self, pixels: int) -> None:
        """Waits until so many pixels may be decoded; outside of a block, and for few, at once.

        Raises:
            ValueError: If the picture is larger than `largest`.
        """
        if self.largest is not None and pixels > self.largest:
            raise ValueError(f"it has {pixels:,} pixels, more than the {self.largest:,} that were allowed")
        if not hasattr(self._mine, "pixels") or pixels < SMALL_PIXELS:
            return
        with self._changed:
            # A thread that holds a picture never waits for another one: no two threads wait for each other.
            if not self._mine.pixels:
                self._changed.wait_for(lambda: not self._held or self._held + pixels <= self.limit)
            self._held += pixels
            self._mine.pixels += pixels

    @property
    def is_held(self) -> bool:
        """Whether this thread holds a picture that counts."""
        return getattr(self._mine, "pixels", 0) > 0

    def release(self) -> None:
        """Says that the pictures of this thread's block are decoded no longer."""
        with self._changed:
            self._held -= self._mine.pixels
            self._mine.pixels = 0
            self._changed.notify_all()


#: What all readers of this process share.
PIXELS = PixelBudget()


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work(item)` of each item, in order, computed by as many threads as torch uses.

    No more results than threads wait to be taken, so that a batch of large pictures never lies in memory decoded. One
    item, or one thread (`torch.set_num_threads(1)`, also the workers of a `DataLoader`), is computed by the caller.

    Args:
        work: What can run beside itself on other items, and profits from it: it must release Python's lock.
        items: Taken one by one, by the caller's thread; those of a list in a run of neighbours for each thread, which
            saves the handing over.

    Raises:
        Exception: What `work` or `items` raise.
    """
    threads = min(torch.get_num_threads(), usable_cores())
    if isinstance(items, Sequence) and len(items) > threads > 1:
        length = math.ceil(len(items) / threads)
        runs = (items[start : start + length] for start in range(0, len(items), length))
        for results in in_threads(lambda run: [work(item) for item in run], runs):
            yield from results
        return
    items = iter(items)
    first = list(itertools.islice(items, 2)) if threads > 1 else []
    items = itertools.chain(first, items)
    if len(first) < 2:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    # A pool for each call: one that is kept would be without its threads in a forked process.
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prefetch(
    items: Iterable[Item], function: Callable[[Item], Result], *, workers: int = 1, depth: int | None = None
) -> Iterator[Result]:
    """`map(function, items)`, computed ahead in threads.

    Decoding and resizing of pictures release Python's lock, and so do the products of a tower; that is what the
    threads gain. The items are taken from their iterable in the caller's thread.

    Args:
        items: Arguments of `function`, taken one by one, no more than `depth` ahead.
        function: What to do with each, called in another thread.
        workers: Threads.
        depth: Results, finished or begun, that may wait to be taken; it bounds the memory. Twice the workers by
            default.

    Yields:
        The results, in the order of the items. An error of `function` (or of `items`) is raised at its place in that
        order, and ends the iteration; what has not begun by then is not done.

    Raises:
        ValueError: At once, if there are fewer than one worker or one result.
    """
    depth = 2 * workers if depth is None else depth
    if workers < 1 or depth < 1:
        raise ValueError(f"workers={workers} and depth={depth} must be at least 1.")
    return _prefetch(items, function, workers, depth)


def _prefetch(items: Iterable[Item], function: Callable[[Item], Result], workers: int, depth: int) -> Iterator[Result]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="siglip-prefetch")
    waiting: deque[Future[Result]] = deque()
    try:
        remaining = iter(items)
        exhausted = False
        while True:
            while not exhausted and len(waiting) < depth:
                try:
                    item = next(remaining)
                except StopIteration:
                    exhausted = True
                except Exception as error:
                    exhausted = True
                    failed: Future[Result] = Future()
                    failed.set_exception(error)
                    waiting.append(failed)
                else:
                    waiting.append(pool.submit(function, item))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
