"""Work on the pictures of a batch side by side: decoding and resizing release Python's lock, so that threads help."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
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
