"""Threads that read and decode while the device encodes, within a bound of memory."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def own_cores() -> int:
    """Cores that this process may use: of those that the system gives it, its share beside a launcher's other ranks."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, given // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def work_ahead(work: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
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


class Gate:
    """Lets threads in while what they bring stays within a limit; what exceeds the limit by itself goes in alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0
        self.changed = threading.Condition()

    @contextmanager
    def room(self, amount: int) -> Iterator[None]:
        """Wait until there is room for `amount`, and take it for the with-block."""
        with self.changed:
            self.changed.wait_for(lambda: self.inside == 0 or self.inside + amount <= self.limit)
            self.inside += amount
        try:
            yield
        finally:
            with self.changed:
                self.inside -= amount
                self.changed.notify_all()
