"""Items that are made one after another -> shards, each item made by one process alone."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from train.latents.locks import claim, claim_all, give_up, open_claims
from train.latents.shards import Item, ShardIndex, remove_partials, write_shard

PAUSE = 0.2  # seconds between looks at what another process is making
T = TypeVar("T")


class ShardWriter:
    """Claims absent items, collects them and writes them by the shard, in a thread of its own; at the end of the
    with-block the rest. `claim` and `give_up` may be called by any thread."""

    def __init__(self, index: ShardIndex, most: int, seconds: float) -> None:
        """most: bytes of a shard. seconds: after which a smaller one is written."""
        self.index, self.most, self.seconds = index, most, seconds
        self.items: dict[str, Item] = {}
        self.size, self.last = 0, time.monotonic()
        self.claims = open_claims(index.folder)
        with claim_all(self.claims) as alone:
            if alone:
                remove_partials(index.folder)
        self.claimed: set[str] = set()
        self.missing: set[str] = set()
        """Every key that was absent when it was first asked for."""
        self.written: set[str] = set()
        self.lock = threading.RLock()
        self.thread = ThreadPoolExecutor(1)
        self.writing: tuple[Future[Path], list[str]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:  # what is made is kept even if the next item failed
            self.settle()
        finally:
            self.thread.shutdown()
            self.claims.close()

    def claim(self, keys: Collection[str]) -> tuple[set[str], bool]:
        """Those of the keys that are absent and that the caller makes from now on; and whether that is all that is
        absent: the others are being made by another process or thread."""
        with self.lock:
            absent = self.index.absent(keys)
            self.missing |= absent
            mine = {key for key in absent - self.claimed if claim(self.claims, key)}
            self.claimed |= mine
            if absent:
                self.index.glance()  # what another process gave up a moment ago is there
            still = self.index.absent(absent)
            self.give_up(mine - still)
            return mine & still, still <= mine

    def give_up(self, keys: Iterable[str]) -> None:
        """Let others make these: they are written, or this process will not make them."""
        with self.lock:
            for key in self.claimed.intersection(keys):
                give_up(self.claims, key)
                self.claimed.remove(key)

    def add(self, key: str, item: Item) -> None:
        self.items[key] = item
        self.size += sum(tensor.nbytes for tensor in item.values())
        if self.size >= self.most or time.monotonic() - self.last >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Begin to write what is collected."""
        self._wait()
        if self.items:
            self.writing = self.thread.submit(write_shard, self.index.folder, self.items), list(self.items)
        self.items, self.size, self.last = {}, 0, time.monotonic()

    def settle(self) -> None:
        """Write what is collected, and find what other processes have written."""
        self.flush()
        self._wait()
        with self.lock:
            self.index.refresh()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            written, keys = writing
            written.result()
            self.written.update(keys)
            self.give_up(keys)


def rounds(todo: list[T], settle: Callable[[], None], absent: Callable[[T], bool]) -> Iterator[tuple[list[T], list[T]]]:
    """The items to make, round by round: first all of them, then those that another process claimed and did not make.

    Each round gives the list to go through, and an empty list: to that the caller adds the items that another process
    is making. settle: writes what was made. absent: whether an item is not stored yet.
    """
    while todo:
        later: list[T] = []
        yield todo, later
        settle()
        later = [one for one in later if absent(one)]
        if len(later) == len(todo):
            time.sleep(PAUSE)
        todo = later
