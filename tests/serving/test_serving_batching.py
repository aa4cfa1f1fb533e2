"""The queue in front of a tower: order, sizes, turns, bounds, and work that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from siglip_hf.serving.batching import Lane
from siglip_hf.serving.problems import Problem


class Tower:
    """Ten times each number; notes its batches, and waits where it is told to."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.batches.append(list(items))
        assert self.gate.wait(30)
        if any(item < 0 for item in items):
            raise ValueError("below zero")
        return [10 * item for item in items]


def run(scenario, **options):
    """Runs a scenario of a lane and its tower in a loop."""
    tower = Tower()

    async def scene():
        lane = Lane("numbers", tower, tower_thread, **{"batch_size": 4, "wait": 0.0, **options})
        result = await scenario(lane, tower)
        assert lane.pending == 0
        return result

    with ThreadPoolExecutor(1) as tower_thread:
        return asyncio.run(scene()), tower


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_results_come_in_order_and_batches_are_bounded():
    async def scenario(lane, tower):
        return await asyncio.gather(lane.submit(list(range(10))), lane.submit([100]), lane.submit([]))

    results, tower = run(scenario)
    assert results == [[10 * n for n in range(10)], [1000], []]
    assert max(map(len, tower.batches)) == 4


def test_requests_of_many_share_a_batch():
    async def scenario(lane, tower):
        return await asyncio.gather(*(lane.submit([n], str(n)) for n in range(8)))

    _, tower = run(scenario, wait=0.5)
    assert [len(batch) for batch in tower.batches] == [4, 4]


def test_one_item_waits_no_longer_than_told():
    async def scenario(lane, tower):
        return await lane.submit([1])

    results, tower = run(scenario, wait=0.01)
    assert (results, tower.batches) == ([10], [[1]])


def test_a_small_request_does_not_wait_behind_a_large_one():
    """Neither one of another client, nor of the same: at most what was taken ahead goes first."""

    async def scenario(lane, tower):
        tower.gate.clear()
        large = asyncio.create_task(lane.submit([0] * 100, "a"))
        await until(lambda: tower.batches)
        small = [asyncio.create_task(lane.submit([7], client)) for client in ("a", "b")]
        await asyncio.sleep(0)
        tower.gate.set()
        await asyncio.gather(*small)
        assert not large.done()
        await large

    _, tower = run(scenario)
    places = [number for number, batch in enumerate(tower.batches) if 7 in batch]
    assert max(places) <= 4 < len(tower.batches) == 26


def test_clients_take_turns():
    async def scenario(lane, tower):
        tower.gate.clear()
        first = asyncio.create_task(lane.submit([9], "z"))
        await until(lambda: tower.batches)
        rest = [asyncio.create_task(lane.submit([n] * 6, client)) for n, client in ((1, "a"), (2, "b"))]
        await asyncio.sleep(0)
        tower.gate.set()
        await asyncio.gather(first, *rest)

    _, tower = run(scenario)
    taken = [item for batch in tower.batches for item in batch]
    assert taken.count(1) == taken.count(2) == 6
    # Eight items were taken ahead for the first alone; from then on they alternate.
    assert taken[-4:] == [2, 2, 2, 2] or taken[-4:] == [1, 2, 1, 2]


def test_a_full_lane_says_when_to_come_again():
    async def scenario(lane, tower):
        tower.gate.clear()
        taken = asyncio.create_task(lane.submit([1] * 5))
        await until(lambda: tower.batches)
        with pytest.raises(Problem) as refused:
            await lane.submit([2])
        tower.gate.set()
        await taken
        assert await lane.submit([3]) == [30]
        return refused.value

    problem, tower = run(scenario, capacity=5)
    assert (problem.status, problem.headers) == (429, {"Retry-After": "1"})
    assert problem.detail == "5 numbers are waiting already; come again in 1 s."
    assert [2] not in tower.batches


def test_cancelled_work_is_not_done():
    async def scenario(lane, tower):
        tower.gate.clear()
        running = asyncio.create_task(lane.submit([1]))
        await until(lambda: tower.batches)
        cancelled = asyncio.create_task(lane.submit([2] * 50))
        kept = asyncio.create_task(lane.submit([3]))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert lane.pending == 2
        tower.gate.set()
        assert await asyncio.gather(running, kept) == [[10], [30]]

    _, tower = run(scenario)
    assert tower.batches == [[1], [3]]


def test_a_failing_batch_fails_its_requests_only():
    async def scenario(lane, tower):
        bad = await asyncio.gather(lane.submit([-1, 5]), return_exceptions=True)
        return bad, await lane.submit([4])

    ((error,), good), _ = run(scenario)
    assert str(error) == "below zero"
    assert good == [40]


def test_an_item_that_cannot_be_prepared_fails_its_request_only():
    def prepare(item):
        if item == 13:
            raise ValueError("thirteen")
        return item + 1

    async def scenario(lane, tower):
        return await asyncio.gather(lane.submit([12, 13, *range(20, 60)]), lane.submit([1, 2]), return_exceptions=True)

    with ThreadPoolExecutor(2) as preparers:
        (error, good), tower = run(scenario, prepare=prepare, preparers=preparers)
    assert str(error) == "thirteen"
    assert good == [20, 30]
    assert sum(map(len, tower.batches)) < 20  # the rest of the failed request is dropped


def test_batches_are_told():
    seen = []

    async def scenario(lane, tower):
        return await lane.submit([1, 2, 3, 4, 5])

    run(scenario, on_batch=lambda name, size, seconds: seen.append((name, size)))
    assert seen == [("numbers", 4), ("numbers", 1)]


def test_a_loop_that_ends_takes_its_timer_with_it_and_the_next_has_one():
    with ThreadPoolExecutor(1) as tower_thread:
        lane = Lane("numbers", Tower(), tower_thread, batch_size=4, wait=0.05)

        async def gives_up():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(lane.submit([1]), 0.001)

        async def stays():
            return await asyncio.wait_for(lane.submit([2]), 20)

        asyncio.run(gives_up())
        assert asyncio.run(stays()) == [20]


@pytest.mark.parametrize("prepare", [None, lambda item: time.sleep(0.2) or item])
def test_a_loop_that_ends_while_a_batch_is_computed_holds_up_no_other(prepare):
    with ThreadPoolExecutor(1) as tower_thread, ThreadPoolExecutor(1) as preparers:
        tower = Tower()
        tower.gate.clear()
        lane = Lane("numbers", tower, tower_thread, batch_size=1, wait=0.0, prepare=prepare, preparers=preparers)

        async def gives_up():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.gather(lane.submit([1, 3]), lane.submit([4])), 0.05)

        async def stays():
            return await asyncio.wait_for(lane.submit([2]), 20)

        asyncio.run(gives_up())
        tower.gate.set()
        assert asyncio.run(stays()) == [20]
        assert lane.pending == 0
