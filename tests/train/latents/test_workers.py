"""Work ahead of its consumer, and the bound of what is decoded at once."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.latents.workers import make_room, own_cores, work_ahead


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_results_come_in_order_and_not_too_far_ahead(waits: list[int], workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[tuple[int, int]]:
        for item in enumerate(waits):
            taken.append(item[0])
            yield item

    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 1000)
        return item[0] ** 2

    for count, result in enumerate(work_ahead(work, items(), workers)):
        assert result == count**2
        assert min(len(waits), count + workers) <= len(taken) <= count + 1 + workers
    assert taken == list(range(len(waits)))


def test_what_fails_is_raised_in_its_place_and_the_rest_is_not_begun() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        if item == 2:
            raise ValueError("the third")
        return item

    results = work_ahead(work, range(100), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert len(begun) < 10


@settings(max_examples=15)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=12), st.integers(1, 10))
def test_room_keeps_its_limit_and_lets_everyone_in(amounts: list[int], limit: int) -> None:
    room, lock, inside, seen = make_room(limit), threading.Lock(), [0, 0], []

    def enter(amount: int) -> None:
        with room(amount):
            with lock:
                inside[0] += amount
                inside[1] += 1
                seen.append(tuple(inside))
            time.sleep(0.001)
            with lock:
                inside[0] -= amount
                inside[1] -= 1

    threads = [threading.Thread(target=enter, args=(amount,)) for amount in amounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert len(seen) == len(amounts)
    assert all(total <= limit or count == 1 for total, count in seen)  # what exceeds it by itself goes in alone


def test_room_is_free_again_after_a_failure() -> None:
    room = make_room(1)
    for _ in range(3):  # the second would wait forever
        with pytest.raises(RuntimeError), room(1):
            raise RuntimeError


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for ranks, cores in (("1", 12), ("4", 3), ("5", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert own_cores() == cores
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert own_cores() == 12
