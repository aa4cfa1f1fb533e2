"""Work done ahead in threads, in order: reading and preparing pictures while a tower computes on the last ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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
