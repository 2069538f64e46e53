"""Encoded things on disk: many items a safetensors file, each found by its key.

A shard is written once, whole or not at all, and never changed: what is new goes into new shards. So any number of
processes may read and add at once without a word between them; only to remove does one need the folder for itself.
Every tensor's checksum stands in its shard's header and is compared at each read. A shard that fails is marked, by a
file of its name that ends in .damaged and says why, and counts as absent from then on.

    1884f2c0b2e4a1d0-5f3a9c11.safetensors   tensors "<key>/<part>"; names sort by the time of writing
"""

import fcntl
import secrets
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infer.program.atomic import replace_file
from infer.program.safetensors_bytes import packed

Item = dict[str, Tensor]
"""The tensors of one key, by part."""
LOCK = ".lock"
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


@dataclass
class Shelf:
    """Where each wanted item is. Of two copies the older one counts, whoever looks and whenever."""

    folder: Path
    wanted: set[str]
    """Only these keys are remembered, so that memory follows what a run uses, not what the folder holds."""
    warn: Callable[[str], None]
    found: dict[str, Path] = field(default_factory=dict)
    """Key -> shard."""
    seen: set[str] = field(default_factory=set)
    stamp: int = 0
    """When the folder was last changed, at the last look."""

    def glance(self) -> None:
        """Look only if the folder has changed since the last look; a change within the same tick of its clock can be
        missed."""
        if self.folder.stat().st_mtime_ns != self.stamp:
            self.refresh()

    def refresh(self) -> list[DamagedError]:
        """Look into the shards that were not there at the last look; returns what cannot be opened."""
        damaged = []
        self.stamp = self.folder.stat().st_mtime_ns if self.folder.is_dir() else 0
        for file in list_shards(self.folder):
            if file.name in self.seen:
                continue
            self.seen.add(file.name)
            try:
                keys = read_keys(file)
            except DamagedError as damage:
                self.distrust(damage)
                damaged.append(damage)
                continue
            for key in keys & self.wanted:
                if key not in self.found or file.name < self.found[key].name:
                    self.found[key] = file
        return damaged

    def distrust(self, damage: DamagedError) -> None:
        """Mark a shard and say so."""
        mark_damaged(damage)
        self.warn(f"{damage}; what it held is not used, and encoded again where it is needed")

    def forget(self) -> None:
        """As if nothing had been looked at."""
        self.found.clear()
        self.seen.clear()

    def by_shard(self, keys: Collection[str]) -> dict[Path, list[str]]:
        """Shard -> those of the keys that are in it."""
        groups: dict[Path, list[str]] = {}
        for key in keys:
            if key in self.found:
                groups.setdefault(self.found[key], []).append(key)
        return groups


def hold(folder: Path, alone: bool = False) -> IO[bytes]:
    """Hold the folder until the stream is closed or the process ends: with others, to read and add, or alone.

    Together waits while one is alone, which never takes long; alone does not wait.

    Raises:
        ValueError: alone is asked for while others hold it, or where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / LOCK).open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError as error:
        stream.close()
        raise ValueError(
            f"{folder} is in use by another process, which may need what would be removed; wait until it ends"
        ) from error
    except OSError as error:
        if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
            stream.close()
            raise
        if alone:  # to read and to add is safe without a lock: only removal needs to know that nobody does
            stream.close()
            raise ValueError(
                f"the file system of {folder} has no locks, so that nobody can tell whether it is in use; "
                "delete the whole folder instead, while nothing runs"
            ) from error
    return stream


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
