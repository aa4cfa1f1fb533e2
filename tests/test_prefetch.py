"""Work ahead in threads: order, bounds, errors."""

import threading

import pytest

from siglip_hf.parallel import prefetch


def test_results_come_in_order_whatever_finishes_first():
    second_is_done = threading.Event()

    def work(item):
        if item == 0:
            assert second_is_done.wait(10)
        elif item == 1:
            second_is_done.set()
        return item * item

    assert list(prefetch(range(20), work, workers=2, depth=4)) == [i * i for i in range(20)]


def test_no_items():
    assert list(prefetch([], str)) == []


def test_it_works_ahead_but_no_further_than_depth():
    taken = []
    both_taken = threading.Event()

    def items():
        for i in range(10):
            taken.append(i)
            yield i

    def work(item):
        if item == 2:
            both_taken.set()
        return item

    results = prefetch(items(), work, workers=1, depth=3)
    assert taken == []
    assert next(results) == 0
    assert both_taken.wait(10)  # item 2 is worked on though nobody has asked for item 1
    assert taken == [0, 1, 2]
    assert next(results) == 1
    assert taken == [0, 1, 2, 3]


def test_an_error_comes_at_its_place():
    results = prefetch(["1", "2", "x", "4"], int, workers=2, depth=4)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="'x'"):
        next(results)
    assert list(results) == []


def test_an_error_of_the_items_comes_after_what_was_before_it():
    def items():
        yield "1"
        yield "2"
        raise OSError("the disk is gone")

    results = prefetch(items(), int, workers=1, depth=8)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_leaving_early_ends_the_threads_and_what_has_not_begun():
    done = []
    results = prefetch(range(100), done.append, workers=1, depth=50)
    next(results)
    results.close()
    assert len(done) <= 50
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("siglip-prefetch")]


@pytest.mark.parametrize("bounds", [{"workers": 0}, {"depth": 0}])
def test_bounds_are_checked_at_once(bounds):
    with pytest.raises(ValueError, match="=0"):
        prefetch([1], str, **bounds)
