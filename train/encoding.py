"""What is not in the cache yet -> shards: pictures in batches, masks, texts; decoded ahead by threads."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from infer.encode import TextEncoder, to_posterior
from train.bucket import View, cut, cut_mask
from train.data import Data
from train.index import Picture
from train.picture import decode, decode_mask, pixel_hash
from train.shards import Item, Shelf, write_shard
from train.source import Sample
from train.workers import Gate, work_ahead

T = TypeVar("T")
MOST_WAITING = 16  # sizes of which a batch is begun


@dataclass
class Encode:
    """How pictures and texts are encoded into the cache. Of these only `tile` changes what comes out."""

    batch_pixels: int | None = None
    """Pixels that the autoencoder takes at once, at least one picture. Null: 2^20 on a GPU, which is four pictures of
    512x512; one picture on a CPU, where more are no faster."""
    tile: int = 2048
    """Pictures with a longer side are encoded in overlapping tiles of this many pixels a side, which bounds memory and
    changes latents near the seams; 0 never tiles."""
    workers: int | None = None
    """Threads that read and decode. Null: one a core."""
    decode_pixels: int = 2**26
    """Pixels decoded at the same time by all threads, at about 12 bytes each; a larger picture is decoded alone."""
    shard_mib: int = 64
    """Encodings are written in files of about this size,"""
    flush_seconds: float = 30.0
    """or after this long: what a killed process has to encode again."""
    verify: bool = True
    """Compare the checksums of all that the run uses before it starts, so that what is damaged is encoded again. False
    starts sooner, and damage stops the run when it is met."""

    def __post_init__(self) -> None:
        if self.batch_pixels is not None and self.batch_pixels < 1:
            raise ValueError(f"encode.batch_pixels is {self.batch_pixels}; it must be 1 or more, or null")
        if self.tile < 0 or self.tile % 32 or self.tile == 32:  # a quarter of it, in latents, is what overlaps
            raise ValueError(
                f"encode.tile is {self.tile}; give a multiple of 32 from 64, such as 2048, or 0 for no tiles"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"encode.workers is {self.workers}; it must be 1 or more, or null")
        for name in ("decode_pixels", "shard_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"encode.{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.flush_seconds >= 0:
            raise ValueError(f"encode.flush_seconds is {self.flush_seconds}; it must be 0 or more")

    @property
    def threads(self) -> int:
        """Threads that read and decode."""
        return self.workers or os.cpu_count() or 1

    def tiled(self, height: int, width: int) -> bool:
        """Whether a picture of this size is encoded in tiles."""
        return 0 < self.tile < max(height, width)

    def batch(self, height: int, width: int, device: torch.device) -> int:
        """How many pictures of this size are encoded at once."""
        most = self.batch_pixels if self.batch_pixels is not None else 2**20 if device.type == "cuda" else 1
        return max(1, most // (height * width))


class Writer:
    """Collects items and writes them by the shard, in a thread of its own; at the end of the with-block the rest."""

    def __init__(self, shelf: Shelf, encode: Encode) -> None:
        self.shelf, self.most, self.seconds = shelf, encode.shard_mib * 2**20, encode.flush_seconds
        self.items: dict[str, Item] = {}
        self.size, self.last = 0, time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[Path] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:  # what is encoded is kept even if the next thing failed
            self.flush()
            self._wait()
        finally:
            self.thread.shutdown()

    def add(self, key: str, item: Item) -> None:
        self.items[key] = item
        self.size += sum(tensor.nbytes for tensor in item.values())
        if self.size >= self.most or time.monotonic() - self.last >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Begin to write what there is, and look what other processes have written meanwhile."""
        self._wait()
        if self.items:
            self.writing = self.thread.submit(write_shard, self.shelf.folder, self.items)
        self.items, self.size, self.last = {}, 0, time.monotonic()
        self.shelf.refresh()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


class Todo(NamedTuple):
    """A sample with its views by key, of which some are missing."""

    sample: Sample
    picture: Picture
    views: dict[str, View]


def encode_pictures(
    vae: AutoencoderKL,
    todo: Iterable[Todo],
    total: int,
    data: Data,
    encode: Encode,
    gate: Gate,
    writer: Writer,
    show: bool,
) -> None:
    """Write the posterior of every missing view: `mean` and `deviation`, [channels, h / 8, w / 8], as the VAE gives it.

    Raises:
        ValueError: a picture is another now than when it was looked at.
    """
    if encode.tile:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = encode.tile, encode.tile // 8

    def read(entry: Todo) -> list[tuple[str, Tensor]]:
        # another process may have been quicker
        missing = {key: view for key, view in entry.views.items() if key not in writer.shelf.found}
        if not missing:
            return []
        name, content = entry.sample.name, entry.sample.read()
        with gate.room(entry.picture.width * entry.picture.height):
            picture = decode(content, name, data.background, data.most_pixels)
            if pixel_hash(picture) != entry.picture.identity:
                raise ValueError(f"{name} changed while it was being encoded; start again")
            return [(key, cut(picture, view).to(vae.dtype)) for key, view in missing.items()]

    def store(keys: list[str], mean: Tensor, deviation: Tensor) -> None:
        for key, *item in zip(keys, mean.cpu(), deviation.cpu(), strict=True):
            writer.add(key, {"mean": item[0].clone(), "deviation": item[1].clone()})

    parts = _progress(work_ahead(read, todo, encode.threads), total, "encoding pictures", show)
    before = None
    for batch in _batches(parts, lambda height, width: encode.batch(height, width, vae.device)):
        posterior = to_posterior(vae, torch.stack([pixels for _, pixels in batch]))
        if before is not None:  # fetched only now, so that the device has its next work while this is stored
            store(*before)
        before = [key for key, _ in batch], *posterior
    if before is not None:
        store(*before)


def _batches(
    parts: Iterable[list[tuple[str, Tensor]]], size: Callable[[int, int], int]
) -> Iterator[list[tuple[str, Tensor]]]:
    """Pictures of one size together, `size(height, width)` of them; short ones when many wait, and at the end."""
    waiting: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
    for part in parts:
        for key, pixels in part:
            height, width = pixels.shape[1:]
            group = waiting.setdefault((height, width), [])
            group.append((key, pixels))
            if len(group) >= size(height, width):
                yield waiting.pop((height, width))
            elif len(waiting) > MOST_WAITING:
                yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def encode_masks(
    todo: Iterable[Todo], total: int, data: Data, encode: Encode, gate: Gate, writer: Writer, show: bool
) -> None:
    """Write every missing view of the masks: `mask`, [h / 8, w / 8] in [0, 1].

    Raises:
        ValueError: a mask is another now than when it was looked at.
    """

    def read(entry: Todo) -> list[tuple[str, Tensor]]:
        sample, picture, views = entry
        assert sample.read_mask is not None
        with gate.room(picture.width * picture.height):
            name = f"the mask of {sample.name}"
            mask = decode_mask(sample.read_mask(), name, (picture.width, picture.height), data.most_pixels)
            if pixel_hash(mask) != picture.mask:
                raise ValueError(f"{name} changed while it was being encoded; start again")
            return [(key, cut_mask(mask, view)) for key, view in views.items() if key not in writer.shelf.found]

    for part in _progress(work_ahead(read, todo, encode.threads), total, "reading masks", show):
        for key, mask in part:
            writer.add(key, {"mask": mask})


def encode_texts(encoder: TextEncoder, todo: dict[str, str], writer: Writer, show: bool) -> None:
    """Write the embeddings of every missing text (key -> text), one by one so that none depends on its neighbours:
    `t5` [tokens, width], `pooled` [width], and `tokens`: what the whole text has, and what T5 sees of it at most."""
    for key, text in _progress(todo.items(), len(todo), "encoding texts", show):
        if key in writer.shelf.found:
            continue
        (encoded,) = encoder([text])
        tokens = torch.tensor([encoder.tokens(text), encoder.length], dtype=torch.int32)
        writer.add(key, {"t5": encoded.t5.clone(), "pooled": encoded.pooled.clone(), "tokens": tokens})


def _progress(items: Iterable[T], total: int, what: str, show: bool) -> Iterator[T]:
    return iter(tqdm(items, what, total, unit=what.split()[-1].rstrip("s"), disable=not show))
