"""What each picture and mask is: a hash of its decoded pixels, and their size; kept by the bytes that are decoded.

To decode every picture at every start only to learn this would take longer than all the rest of a start, so shards
(train/latents/shards.py) keep which bytes gave which pixels. The bytes themselves are hashed, and a file that is there
as it was, inode and times included, is not read again for that (infer/program/remembered.py).
"""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from infer.program.remembered import Remembered
from train.latents.shards import DamagedError, list_shards, mark_damaged, prune, read_item, read_keys, write_shard

DECODING = 2  # to be raised when the same bytes are decoded to other pixels than before
Warn = Callable[[str], None]
Table = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]
"""Digests of bytes [n, 32], hashes of their pixels [n, 32], widths and heights [n, 2]."""


class Shown(NamedTuple):
    """A reference picture, known by its pixels."""

    identity: str
    width: int
    height: int


class Picture(NamedTuple):
    """A picture, known by its pixels, with its mask and its references."""

    identity: str
    """A hash of the decoded pixels."""
    width: int
    height: int
    mask: str | None = None
    """A hash of the mask's pixels, which are scaled to the picture's size; None without a mask."""
    references: tuple[Shown, ...] = ()


def digest(content: bytes, *settings: object) -> bytes:
    """A hash of bytes and of what else their decoding depends on."""
    hashed = hashlib.sha256(repr((PIL.__version__, DECODING, *settings)).encode())
    hashed.update(content)
    return hashed.digest()


def digest_file(
    file: Path | None, read: Callable[[], bytes], remembered: Remembered, *settings: object
) -> tuple[bytes, bytes | None]:
    """The digest of what `read` reads, and its bytes; None where they were not read, as the file is unchanged."""
    content = None

    def find() -> str:
        nonlocal content
        content = read()
        return digest(content, *settings).hex()

    found = find() if file is None else remembered.value(file, repr((PIL.__version__, DECODING, *settings)), find)
    return bytes.fromhex(found), content


def known_identities(folder: Path, warn: Warn) -> Callable[[bytes], Picture | None]:
    """A function from the digest of some bytes to what they decode to, by all that the folder holds: 80 bytes each."""
    tables = list(_tables(folder, warn))
    if not tables:
        return lambda _: None
    digests, pixels, sizes = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    first = digests.view(">u8")[:, 0].astype(np.uint64)
    order = np.argsort(first)
    first = first[order]

    def find(wanted: bytes) -> Picture | None:
        start = int.from_bytes(wanted[:8], "big")
        at = int(np.searchsorted(first, np.uint64(start)))
        while at < len(first) and first[at] == start:
            row = order[at]
            if digests[row].tobytes() == wanted:
                return Picture(pixels[row].tobytes().hex(), *sizes[row].tolist())
            at += 1
        return None

    return find


def read_identities(folder: Path, warn: Warn) -> Iterator[tuple[bytes, Picture]]:
    """All that the folder knows: the digest of some bytes, and what they decode to."""
    for digests, pixels, sizes in _tables(folder, warn):
        for given, hashed, size in zip(digests, pixels, sizes.tolist(), strict=True):
            yield given.tobytes(), Picture(hashed.tobytes().hex(), *size)


def write_identities(folder: Path, pictures: dict[bytes, Picture]) -> None:
    """One more shard of them, by the digest of their bytes; masks are rows of their own."""

    def table(digests: Iterable[bytes]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32).copy())

    size = torch.tensor([(picture.width, picture.height) for picture in pictures.values()], dtype=torch.int32)
    pixels = table(bytes.fromhex(picture.identity) for picture in pictures.values())
    write_shard(folder, {secrets.token_hex(8): {"bytes": table(pictures), "pixels": pixels, "size": size}})


def prune_identities(folder: Path, identities: set[str], warn: Warn) -> None:
    """Keep what is known of these pixels alone, in one shard. The caller holds the cache alone."""
    kept = {key: picture for key, picture in read_identities(folder, warn) if picture.identity in identities}
    old = [key for file in list_shards(folder) for key in read_keys(file)]
    if kept:
        write_identities(folder, kept)
    prune(folder, {key for file in list_shards(folder) for key in read_keys(file)} - set(old))


def _tables(folder: Path, warn: Warn) -> Iterator[Table]:
    for file in list_shards(folder):
        try:
            for key in read_keys(file):
                item = read_item(file, key, "bytes", "pixels", "size")
                yield item["bytes"].numpy(), item["pixels"].numpy(), item["size"].numpy()
        except DamagedError as damage:
            mark_damaged(damage)
            warn(f"{damage}: the pictures that it knew are decoded again")
