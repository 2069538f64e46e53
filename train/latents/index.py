"""What each sample's picture and mask are: a hash of their decoded pixels, and their size.

To decode everything at every start only to learn this would take longer than all the rest of it, so shards
(train/latents/shards.py) keep which bytes gave which pixels. The bytes themselves are hashed, and a file that is there
as it was, inode and times included, is not read again for that (infer/program/remembered.py).
"""

import hashlib
import io
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

from infer.program.remembered import Remembered
from train.data.dataset import Data
from train.data.decode import DECODING, FORMATS, decode, decode_mask, pixel_hash
from train.data.source import Sample
from train.latents.shards import DamagedError, list_shards, mark_damaged, prune, read_item, read_keys, write_shard
from train.latents.workers import Gate, work_ahead

A = TypeVar("A")
B = TypeVar("B")
Warn = Callable[[str], None]
MASK = "its mask"  # as messages name it, after the sample's name


class Picture(NamedTuple):
    """A sample's picture and mask, known by their pixels."""

    identity: str
    width: int
    height: int
    mask: str | None


class Fault(NamedTuple):
    """Why a sample cannot be used; the message follows its name."""

    reason: str


class Row(NamedTuple):
    """What some bytes are when they are decoded."""

    identity: bytes
    width: int
    height: int


def read_rows(folder: Path, warn: Warn) -> Iterator[tuple[bytes, Row]]:
    """Hash of bytes and settings, and what they are; for all that the folder knows."""
    for file in list_shards(folder):
        try:
            for key in read_keys(file):
                item = read_item(file, key, "bytes", "pixels", "size")
                given, pixels = (item[part].numpy().tobytes() for part in ("bytes", "pixels"))
                for i, (width, height) in enumerate(item["size"].tolist()):
                    own = slice(32 * i, 32 * (i + 1))
                    yield given[own], Row(pixels[own], width, height)
        except DamagedError as damage:
            mark_damaged(damage)
            warn(f"{damage}: the pictures that it knew are decoded again")


def write_rows(folder: Path, rows: dict[bytes, Row]) -> None:
    """One more shard."""

    def table(digests: Iterable[bytes]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32).copy())

    size = torch.tensor([(row.width, row.height) for row in rows.values()], dtype=torch.int32)
    item = {"bytes": table(rows), "pixels": table(row.identity for row in rows.values()), "size": size}
    write_shard(folder, {secrets.token_hex(8): item})


def prune_index(folder: Path, identities: set[str], warn: Warn) -> None:
    """Keep the rows of these pixels alone, in one shard. The caller holds the cache alone."""
    rows = {key: row for key, row in read_rows(folder, warn) if row.identity.hex() in identities}
    old = [key for file in list_shards(folder) for key in read_keys(file)]
    if rows:
        write_rows(folder, rows)
    prune(folder, {key for file in list_shards(folder) for key in read_keys(file)} - set(old))


@dataclass
class Index:
    """What is known of the bytes that this run meets, and how more is learned."""

    folder: Path
    seconds: float
    """Between writes of what is new, so that an interrupted start loses little."""
    workers: int
    gate: Gate
    """How many pixels are decoded at once."""
    warn: Warn
    show: bool
    remembered: Remembered
    """The hashes of files that were read before."""
    rows: dict[bytes, Row] = field(default_factory=dict)
    new: dict[bytes, Row] = field(default_factory=dict)

    def flush(self) -> None:
        if self.new:
            write_rows(self.folder, self.new)
        self.new = {}


def digest(content: bytes, *settings: object) -> bytes:
    """A hash of bytes and of what else their decoding depends on."""
    own = hashlib.sha256(repr((PIL.__version__, DECODING, *settings)).encode())
    own.update(content)
    return own.digest()


def identify(samples: list[Sample], data: Data, index: Index) -> list[Picture | Fault]:
    """What each of the samples is, in their order."""

    def remember(file: Path | None, read: Callable[[], bytes], *settings: object) -> bytes:
        def find() -> str:
            return digest(read(), *settings).hex()

        if file is None:
            return bytes.fromhex(find())
        return bytes.fromhex(index.remembered.value(file, repr((PIL.__version__, DECODING, *settings)), find))

    def hash_bytes(sample: Sample) -> tuple[bytes, bytes | None]:
        picture = remember(sample.file, sample.read, "picture", data.background)
        read_mask = sample.read_mask
        return picture, remember(sample.mask_file, read_mask, "mask", picture) if read_mask else None

    def find_picture(key: bytes) -> Row:
        sample = pictures[key]
        content = sample.read()
        _unchanged(digest(content, "picture", data.background) == key)
        with index.gate.room(pixels_of(content)):
            picture = decode(content, sample.name, data.background, data.most_pixels)
            return Row(bytes.fromhex(pixel_hash(picture)), *picture.size)

    def find_mask(key: bytes) -> Row:
        sample, picture = masks[key]
        assert sample.read_mask is not None
        content, size = sample.read_mask(), index.rows[picture][1:]
        _unchanged(digest(content, "mask", picture) == key)
        with index.gate.room(max(pixels_of(content), size[0] * size[1])):
            mask = decode_mask(content, MASK, size, data.most_pixels)
            return Row(bytes.fromhex(pixel_hash(mask)), *size)

    bar = tqdm(samples, "hashing pictures", unit="picture", disable=not index.show)
    keys = list(work_ahead(lambda sample: _try(sample, hash_bytes, sample), bar, index.workers))
    index.remembered.save()
    hashed = [(sample, *key) for sample, key in zip(samples, keys, strict=True) if not isinstance(key, Fault)]
    pictures = {picture: sample for sample, picture, _ in reversed(hashed)}  # of equal ones the first
    _remember(index, pictures)
    known = {
        key for key in pictures if key in index.rows and index.rows[key][1] * index.rows[key][2] <= data.most_pixels
    }
    faults = _learn(index, {key: sample for key, sample in pictures.items() if key not in known}, find_picture)
    masks = {mask: (sample, picture) for sample, picture, mask in reversed(hashed) if mask and picture not in faults}
    _remember(index, masks)
    faults |= _learn(index, {key: sample for key, (sample, _) in masks.items() if key not in index.rows}, find_mask)

    def result(key: tuple[bytes, bytes | None] | Fault) -> Picture | Fault:
        if isinstance(key, Fault):
            return key
        picture, mask = key
        for part in key:
            if part in faults:
                return faults[part]
        row = index.rows[picture]
        return Picture(row.identity.hex(), *row[1:], index.rows[mask].identity.hex() if mask else None)

    return [result(key) for key in keys]


def _remember(index: Index, asked: Collection[bytes]) -> None:
    """Take the rows of these from the folder, and no others, so that memory follows the run and not the folder."""
    if asked:
        index.rows |= {key: row for key, row in read_rows(index.folder, index.warn) if key in asked}


def _learn(index: Index, absent: dict[bytes, Sample], find: Callable[[bytes], Row]) -> dict[bytes, Fault]:
    """Decode what is not known, and write it down; returns what failed."""
    faults, written = {}, time.monotonic()
    found = work_ahead(lambda key: _try(absent[key], find, key), absent, index.workers)
    bar = tqdm(found, "decoding pictures", len(absent), unit="picture", disable=not (index.show and absent))
    try:
        for key, row in zip(absent, bar, strict=True):
            if isinstance(row, Fault):
                faults[key] = row
            else:
                index.rows[key] = index.new[key] = row
            if time.monotonic() - written > index.seconds:
                index.flush()
                written = time.monotonic()
    finally:
        index.flush()
    return faults


def _try(sample: Sample, work: Callable[[A], B], item: A) -> B | Fault:
    """What `work` gives, or the Fault that it raises, without the name that leads it."""
    try:
        return work(item)
    except (ValueError, OSError) as error:
        return Fault(str(error).removeprefix(sample.name).strip())


def _unchanged(same: bool) -> None:
    if not same:
        raise ValueError("changed while it was being read; start again")


def pixels_of(content: bytes) -> int:
    """How many pixels the header says; 0 if it cannot be read, and then decoding says why."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # each format's reader raises other kinds
        return 0
