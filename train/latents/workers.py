"""Threads that read and decode while the device encodes, within a bound of memory."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
Room = Callable[[int], AbstractContextManager[None]]
"""Waits until there is room for so many pixels, and takes it for the with-block."""


def own_cores() -> int:
    """Cores that this process may use: of those that the system gives it, its share beside a launcher's other ranks."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, given // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def work_ahead(work: Callable[[A], B], items: Iterable[A], workers: int) -> Generator[B, None, None]:
    """`work(item)` for each item in their order, up to one more than `workers` of them ahead of the consumer.

    Pillow and the hashes let go of Python's lock, so that threads do. What `work` raises is raised here.
    """
    ahead: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_room(limit: int) -> Room:
    """Room for `limit` pixels, which threads share; what exceeds the limit by itself goes in alone."""
    inside, changed = 0, threading.Condition()

    @contextmanager
    def room(pixels: int) -> Iterator[None]:
        nonlocal inside
        with changed:
            changed.wait_for(lambda: inside == 0 or inside + pixels <= limit)
            inside += pixels
        try:
            yield
        finally:
            with changed:
                inside -= pixels
                changed.notify_all()

    return room
