"""Items that are made one after another -> shards, each made by one process alone."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from train.latents.claims import Claims
from train.latents.shards import Item, Shelf, remove_partials, write_shard

PAUSE = 0.2  # seconds between looks at what another process is making


class Todo(NamedTuple):
    """Something of which the items are to be made."""

    of: Any
    items: dict[str, Any]
    """By key."""


class Writer:
    """Collects items and writes them by the shard, in a thread of its own; at the end of the with-block the rest."""

    def __init__(self, shelf: Shelf, most: int, seconds: float) -> None:
        """most: bytes of a shard. seconds: after which a smaller one is written."""
        self.shelf, self.most, self.seconds = shelf, most, seconds
        self.items: dict[str, Item] = {}
        self.size, self.last = 0, time.monotonic()
        self.claims = Claims(shelf.folder)
        with self.claims.everything() as alone:
            if alone:
                remove_partials(shelf.folder)
        self.thread = ThreadPoolExecutor(1)
        self.writing: tuple[Future[Path], list[str]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:  # what is made is kept even if the next thing failed
            self.settle()
        finally:
            self.thread.shutdown()
            self.claims.close()

    def rounds(self, todo: Iterable[Todo]) -> Iterator[Iterator[Todo]]:
        """What is to be made, with those of its items that are: first what no other process is making, then, round by
        round, what another one has not made after all. The caller adds all items of a round before the next."""
        left = todo
        while True:
            later: list[Todo] = []
            yield self._claimed(left, later)
            self.settle()
            if not later:
                return
            if len(later) == len(left if isinstance(left, list) else ()):
                time.sleep(PAUSE)
            left = later

    def _claimed(self, todo: Iterable[Todo], later: list[Todo]) -> Iterator[Todo]:
        for entry in todo:
            absent = {key: item for key, item in entry.items.items() if key not in self.shelf.found}
            own = {key: item for key, item in absent.items() if self.claims.take(key)}
            self.shelf.glance()  # what another process let go of a moment ago is there
            done = own.keys() & self.shelf.found.keys()
            self.claims.free(done)
            others = {key: item for key, item in absent.items() if key not in own and key not in self.shelf.found}
            if others:
                later.append(Todo(entry.of, others))
            mine = {key: item for key, item in own.items() if key not in done}
            if mine or not others:
                yield Todo(entry.of, mine)

    def add(self, key: str, item: Item) -> None:
        self.items[key] = item
        self.size += sum(tensor.nbytes for tensor in item.values())
        if self.size >= self.most or time.monotonic() - self.last >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Begin to write what there is."""
        self._wait()
        if self.items:
            self.writing = self.thread.submit(write_shard, self.shelf.folder, self.items), list(self.items)
        self.items, self.size, self.last = {}, 0, time.monotonic()

    def settle(self) -> None:
        """Write what there is, and let other processes have what is left."""
        self.flush()
        self._wait()
        self.shelf.refresh()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            written, keys = writing
            written.result()
            self.claims.free(keys)
