"""What is not in the cache yet -> shards: pictures in batches, masks, texts; decoded ahead by threads."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from infer.quantize.compute import compute_dtype_of
from infer.sample.encode import TextEncoder, to_posterior
from train.data.buckets import cut, cut_mask
from train.data.dataset import Data
from train.data.decode import decode, decode_mask, pixel_hash
from train.data.source import Sample
from train.latents.index import Picture
from train.latents.settings import Encode
from train.latents.workers import Gate, work_ahead
from train.latents.writer import Todo, Writer

MOST_WAITING = 16  # sizes of which a batch is begun


class Seen(NamedTuple):
    """A sample and what it was when it was looked at."""

    sample: Sample
    picture: Picture


@dataclass
class Work:
    """What is to be made of one kind, and where it goes."""

    writer: Writer
    todo: Iterable[Todo]
    """Samples (Seen) with their views by key; or texts."""
    total: int
    encode: Encode
    gate: Gate
    """How many pixels are decoded at once."""
    show: bool

    def rounds(self, what: str) -> Iterator[Iterator[Todo]]:
        """The writer's rounds, under a bar."""
        with tqdm(total=self.total, desc=what, unit=what.split()[-1].rstrip("s"), disable=not self.show) as bar:

            def counted(entries: Iterator[Todo]) -> Iterator[Todo]:
                for entry in entries:
                    yield entry
                    bar.update()

            for entries in self.writer.rounds(self.todo):
                yield counted(entries)


def encode_pictures(vae: AutoencoderKL, work: Work, data: Data) -> None:
    """Write the posterior of every missing view: `mean` and `deviation`, [channels, h / 8, w / 8], as the VAE gives it.

    Raises:
        ValueError: a picture is another now than when it was looked at.
    """
    encode, device = work.encode, vae.device
    if encode.tile:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = encode.tile, encode.tile // 8
    if device.type == "cpu":  # oneDNN convolves this layout at 2.4 times the speed
        vae.to(memory_format=torch.channels_last)

    def read(entry: Todo) -> list[tuple[str, Tensor]]:
        if not entry.items:
            return []
        sample, seen = entry.of
        content = sample.read()
        with work.gate.room(seen.width * seen.height):
            picture = decode(content, sample.name, data.background, data.most_pixels)
            if pixel_hash(picture) != seen.identity:
                raise ValueError(f"{sample.name} changed while it was being encoded; start again")
            return [(key, cut(picture, view).to(compute_dtype_of(vae))) for key, view in entry.items.items()]

    def store(keys: list[str], fetch: Callable[[], list[Tensor]]) -> None:
        for key, *item in zip(keys, *fetch(), strict=True):
            work.writer.add(key, {"mean": item[0].clone(), "deviation": item[1].clone()})

    for entries in work.rounds("encoding pictures"):
        before = None
        parts = work_ahead(read, entries, encode.threads)
        for batch in _batches(parts, lambda height, width: encode.batch(height, width, device)):
            pixels = _onto(torch.stack([pixels for _, pixels in batch]), device)
            fetch = _fetching(to_posterior(vae, pixels))
            if before is not None:  # awaited only now, so that the device has its next work while this is stored
                store(*before)
            before = [key for key, _ in batch], fetch
        if before is not None:
            store(*before)


def _onto(pixels: Tensor, device: torch.device) -> Tensor:
    """The pixels on the device. A GPU copies them out of pinned memory when it comes to it, and nobody waits."""
    if device.type == "cuda":
        return pixels.pin_memory().to(device, non_blocking=True)
    return pixels.contiguous(memory_format=torch.channels_last)


def _fetching(tensors: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
    """Begin to copy these from their device, behind the work that is queued there by now and before any that follows;
    the result waits for the copies and gives them."""
    if tensors[0].device.type != "cuda":
        return lambda: list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[Tensor]:
        copied.synchronize()
        return copies

    return wait


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


def encode_masks(work: Work, data: Data) -> None:
    """Write every missing view of the masks: `mask`, [h / 8, w / 8] in [0, 1].

    Raises:
        ValueError: a mask is another now than when it was looked at.
    """

    def read(entry: Todo) -> list[tuple[str, Tensor]]:
        if not entry.items:
            return []
        sample, seen = entry.of
        with work.gate.room(seen.width * seen.height):
            name = f"the mask of {sample.name}"
            mask = decode_mask(sample.read_mask(), name, (seen.width, seen.height), data.most_pixels)
            if pixel_hash(mask) != seen.mask:
                raise ValueError(f"{name} changed while it was being encoded; start again")
            return [(key, cut_mask(mask, view)) for key, view in entry.items.items()]

    for entries in work.rounds("reading masks"):
        for part in work_ahead(read, entries, work.encode.threads):
            for key, mask in part:
                work.writer.add(key, {"mask": mask})


def encode_texts(encoder: TextEncoder, work: Work) -> None:
    """Write the embeddings of every missing text, one by one so that none depends on its neighbours: `t5`
    [tokens, width], `pooled` [width], and `tokens`: what the whole text has, and what T5 sees of it at most."""
    for entries in work.rounds("encoding texts"):
        for entry in entries:
            for key, text in entry.items.items():
                (encoded,) = encoder([text])
                tokens = torch.tensor([encoder.tokens(text), encoder.length], dtype=torch.int32)
                item = {"t5": encoded.t5.clone(), "pooled": encoded.pooled.clone(), "tokens": tokens}
                work.writer.add(key, item)
