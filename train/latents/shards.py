"""Encoded things on disk: many items a safetensors file, each found by its key.

A shard is written once, whole or not at all, and never changed: what is new goes into new shards. So any number of
processes may read and add at once without a word between them; only to remove does one need the folder for itself.
Every tensor's checksum stands in its shard's header and is compared at each read. A shard that fails is marked, by a
file of its name that ends in .damaged and says why, and counts as absent from then on.

    1884f2c0b2e4a1d0-5f3a9c11.safetensors   tensors "<key>/<part>"; names sort by the time of writing
"""

import secrets
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infer.program.atomic import replace_file
from infer.program.safetensors_bytes import packed

Item = dict[str, Tensor]
"""The tensors of one key, by part."""
PARTIAL = ".*.partial"  # what infer/program/atomic.py leaves behind when the process is killed


class DamagedError(ValueError):
    """A shard that is not what was written."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file} is damaged ({reason})")
        self.file, self.reason = file, reason


def checksum(name: str, tensor: Tensor) -> str:
    """Of a tensor's name, type, shape and bytes: CRC-32, which is there to notice accidents, at 4 GB/s."""
    start = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    return f"{zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, start):08x}"


def write_shard(folder: Path, items: dict[str, Item]) -> Path:
    """Write items into a new shard, at once or not at all."""
    tensors = {f"{key}/{part}": tensor.contiguous() for key, item in items.items() for part, tensor in item.items()}
    sums = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    file = folder / f"{time.time_ns():016x}-{secrets.token_hex(4)}.safetensors"
    replace_file(file, lambda path: path.write_bytes(packed(tensors, sums)))
    return file


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The shard, mapped into memory; its length is compared with its header."""
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise DamagedError(file, str(error) or type(error).__name__) from error


def _checked(shard: Any, sums: dict[str, str], file: Path, name: str) -> Tensor:
    tensor: Tensor = shard.get_tensor(name)
    if sums.get(name) != checksum(name, tensor):
        raise DamagedError(file, f"the checksum of {name} differs from what was written")
    return tensor


def read_item(file: Path, key: str, *parts: str) -> Item:
    """The named parts of one key, out of a shard, in memory of their own.

    Raises:
        DamagedError: the shard is absent, cut short, or its bytes are not those that were written.
    """
    with _opened(file) as shard:
        sums = shard.metadata() or {}
        return {part: _checked(shard, sums, file, f"{key}/{part}").clone() for part in parts}


def read_keys(file: Path) -> set[str]:
    """The keys of what a shard holds.

    Raises:
        DamagedError: the shard cannot be opened.
    """
    with _opened(file) as shard:
        return {name.rpartition("/")[0] for name in shard.keys()}  # noqa: SIM118 - no dictionary


def read_part(file: Path, keys: Collection[str], part: str) -> dict[str, Tensor]:
    """One part of each of these keys, as read_item gives it, out of a shard that is opened once.

    Raises:
        DamagedError: as read_item does.
    """
    with _opened(file) as shard:
        sums = shard.metadata() or {}
        return {key: _checked(shard, sums, file, f"{key}/{part}").clone() for key in keys}


def verify(file: Path, keys: Collection[str]) -> None:
    """Read all tensors of these keys and compare their checksums, one tensor at a time.

    Raises:
        DamagedError: one of them is not what was written.
    """
    for _ in _tensors(file, keys):
        pass


def _tensors(file: Path, keys: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Key, part and tensor of all that a shard holds of these keys, compared with their checksums."""
    with _opened(file) as shard:
        sums = shard.metadata() or {}
        for name in shard.keys():  # noqa: SIM118 - no dictionary
            key, _, part = name.rpartition("/")
            if key in keys:
                yield key, part, _checked(shard, sums, file, name)


def list_shards(folder: Path) -> list[Path]:
    """Those that are not marked as damaged, oldest first."""
    if not folder.is_dir():
        return []
    names = {path.name for path in folder.iterdir()}
    good = [n for n in names if n.endswith(".safetensors") and not n.startswith(".") and _mark(n) not in names]
    return [folder / name for name in sorted(good)]


def _mark(name: str) -> str:
    return name.removesuffix(".safetensors") + ".damaged"


def mark_damaged(damage: DamagedError) -> None:
    """Have the shard count as absent, for every process that lists the folder from now on."""
    replace_file(damage.file.with_name(_mark(damage.file.name)), lambda path: path.write_text(damage.reason + "\n"))


class ShardIndex:
    """Which shard holds each item of a folder. Of two copies the older one counts, whoever looks and whenever.

    It holds 12 bytes an item: 64 bits of a hash of the key, and the shard's number. Of a million absent keys, one is
    taken for one of a million items with a probability of 1 in 20 million; whoever reads it is told that the shard is
    damaged.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn
        self.stamp = 0
        """When the folder was last changed, at the last look."""
        self.forget()

    def forget(self) -> None:
        """As if no shard had been looked at."""
        self.seen: set[str] = set()
        self.table = _Table([], np.empty(0, np.int64), np.empty(0, np.int32))

    def glance(self) -> None:
        """Look only if the folder has changed since the last look; a change within the same tick of its clock can be
        missed."""
        if self.folder.stat().st_mtime_ns != self.stamp:
            self.refresh()

    def refresh(self) -> list[DamagedError]:
        """Look into the shards that were not there at the last look; returns those that cannot be opened."""
        damaged, shards = [], list(self.table.shards)
        hashes, numbers = [self.table.hashes], [self.table.numbers]
        self.stamp = self.folder.stat().st_mtime_ns if self.folder.is_dir() else 0
        for file in list_shards(self.folder):
            if file.name in self.seen:
                continue
            self.seen.add(file.name)
            try:
                hashes.append(_hashes(read_keys(file)))
            except DamagedError as damage:
                self.distrust(damage)
                damaged.append(damage)
            else:
                numbers.append(np.full(len(hashes[-1]), len(shards), np.int32))
                shards.append(file)
        if len(shards) > len(self.table.shards):
            age = np.argsort(np.argsort([file.name for file in shards]))
            every, number = np.concatenate(hashes), np.concatenate(numbers)
            order = np.lexsort((age[number], every))
            self.table = _Table(shards, every[order], number[order])  # at once, for threads that look meanwhile
        return damaged

    def distrust(self, damage: DamagedError) -> None:
        """Mark a shard as damaged, and say so."""
        mark_damaged(damage)
        self.warn(f"{damage}; what it held is not used, and encoded again where it is needed")

    def find(self, key: str) -> Path | None:
        """The shard of an item; None if it is absent."""
        return self._locate([key])[0]

    def absent(self, keys: Collection[str]) -> set[str]:
        """Those of the keys that are in no shard."""
        return {key for key, file in zip(keys, self._locate(keys), strict=True) if file is None}

    def by_shard(self, keys: Collection[str]) -> dict[Path, list[str]]:
        """Shard -> those of the keys that are in it."""
        groups: dict[Path, list[str]] = {}
        for key, file in zip(keys, self._locate(keys), strict=True):
            if file is not None:
                groups.setdefault(file, []).append(key)
        return groups

    def _locate(self, keys: Collection[str]) -> list[Path | None]:
        shards, hashes, numbers = self.table
        asked = _hashes(keys)
        if not len(hashes):
            return [None] * len(asked)
        at = np.minimum(np.searchsorted(hashes, asked), len(hashes) - 1)
        there = hashes[at] == asked
        return [shards[n] if yes else None for n, yes in zip(numbers[at].tolist(), there.tolist(), strict=True)]


class _Table(NamedTuple):
    shards: list[Path]
    hashes: NDArray[np.int64]  # [items], ascending; of equal ones the oldest shard's first
    numbers: NDArray[np.int32]  # [items], which of the shards


def _hashes(keys: Collection[str]) -> NDArray[np.int64]:
    """Python's own hashes: others in every process, and quick."""
    return np.fromiter(map(hash, keys), np.int64, len(keys))


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left; the caller knows that nobody is writing."""
    for partial in folder.glob(PARTIAL):
        partial.unlink(missing_ok=True)


def prune(folder: Path, keep: Collection[str]) -> None:
    """Remove every item but these, second copies, damaged shards and what killed processes left.

    The caller holds the cache alone. Killed at any time, it has lost nothing of what it keeps.
    """
    kept: set[str] = set()
    for file in list_shards(folder):
        try:
            keys = read_keys(file)
            own = {key for key in keys if key in keep and key not in kept}
            if own and own != keys:
                items: dict[str, Item] = {}
                for key, part, tensor in _tensors(file, own):
                    items.setdefault(key, {})[part] = tensor
                write_shard(folder, items)
        except DamagedError as damage:
            mark_damaged(damage)
            continue
        kept |= own
        if own != keys:
            file.unlink()
    for mark in folder.glob("*.damaged"):
        mark.with_suffix(".safetensors").unlink(missing_ok=True)
        mark.unlink()
    remove_partials(folder)
