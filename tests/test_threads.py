"""Work in threads gives the same results, in order, few at a time, and passes errors on."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from siglip_hf import parallel
from siglip_hf.parallel import in_threads, one_torch_thread


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch) -> int:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 8)
    return request.param


def test_results_come_in_order_and_few_wait(threads):
    taken = []
    results = in_threads(lambda item: item * item, (taken.append(item) or item for item in range(50)))
    assert next(results) == 0
    assert len(taken) <= threads + 1
    assert list(results) == [item * item for item in range(1, 50)]


def test_as_many_threads_work_as_torch_uses(threads):
    names = set()
    meet = threading.Barrier(threads, timeout=20)

    def work(item: int) -> None:
        meet.wait()  # passes only if so many are at work at once
        names.add(threading.current_thread().name)

    list(in_threads(work, range(2 * threads)))
    assert len(names) == threads
    assert (threading.current_thread().name in names) == (threads == 1)


def test_a_single_item_needs_no_thread(threads):
    assert list(in_threads(lambda item: threading.current_thread(), [0])) == [threading.current_thread()]
    assert list(in_threads(str, [])) == []


def test_errors_are_passed_on(threads):
    def items():
        yield from (1, 2, 3)
        raise OSError("no more")

    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda item: 1 / item, [1, 0, 2, 0]))
    with pytest.raises(OSError, match="no more"):
        list(in_threads(str, items()))


def test_each_thread_takes_a_run_of_a_list(threads):
    names = {}

    def work(item: int) -> int:
        names[item] = threading.current_thread().name
        return item * item

    items = list(range(10))
    assert list(in_threads(work, items)) == [item * item for item in items]
    runs = [items] if threads == 1 else [items[:4], items[4:8], items[8:]]
    assert all(len({names[item] for item in run}) == 1 for run in runs)


def test_a_quota_of_the_control_group_counts(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(parallel, "_CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for text, cores in (("max 100000\n", 8), ("250000 100000\n", 3), ("50000 100000\n", 1)):
        quota.write_text(text)
        assert parallel.usable_cores() == cores


def test_one_torch_thread_is_for_the_thread_that_asks():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as asked:
            assert asked.submit(torch.get_num_threads).result() == 3
            asked.submit(one_torch_thread).result()
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 3
            asked.submit(lambda: torch.rand(300, 300) @ torch.rand(300, 300)).result()
            assert asked.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
