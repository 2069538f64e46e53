"""Pictures that are not in the cache yet -> shards.

Threads read ahead (prepare.py). They hash a file's bytes. If it is known what these decode to, and all its views are
stored, nothing more is done. Else the bytes are decoded, hashed and cut to the sample's views at once: a new picture is
read and decoded once. The autoencoder takes the views in batches of one size.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infer.program.remembered import Remembered
from infer.quantize.compute import compute_dtype, small_dtype
from infer.sample.encode import check_latents, to_posterior
from train.data.source import Sample, Skipped
from train.latents.identities import Picture, known_identities, write_identities
from train.latents.prepare import Tensors, make_preparer
from train.latents.settings import Encode
from train.latents.store import Cache
from train.latents.workers import work_ahead
from train.latents.writer import ShardWriter, rounds

MOST_WAITING = 16  # sizes of which a batch is begun


def encode_pictures(
    cache: Cache,
    samples: list[Sample],
    todo: list[int],
    load: Callable[[], Any],
    writers: dict[str, ShardWriter],
    remembered: Remembered,
    encode: Encode,
    device: torch.device,
    show: bool,
) -> dict[int, Picture | Skipped]:
    """Write what the cache lacks of these samples, and return what each of them is. A missing view is written as the
    autoencoder's posterior: `mean` and, where the family is trained on samples of it, `deviation`, [channels, h / 8, w
    / 8]. A mask's view is written as `mask`, [h / 8, w / 8] in [0, 1]. Under data.on_error=raise it stops at the first
    sample that cannot be used.

    Raises:
        NotFiniteError: the autoencoder makes NaN or infinity of a picture, which is then not written.

    load: gives the autoencoder, and is called when the first view has to be encoded. writers: by kind.
    """
    folder = cache.folder / "index"
    stored = known_identities(folder, cache.indexes["pictures"].warn)
    known: dict[bytes, Picture] = {}  # what was learned here
    unwritten: dict[bytes, Picture] = {}
    names: dict[str, str] = {}  # of the pictures by their views' keys
    found: dict[int, Picture | Skipped] = {}
    dtype = compute_dtype(small_dtype(device), device)
    prepare = make_preparer(
        cache, samples, writers, remembered, lambda key: known.get(key) or stored(key), encode, dtype
    )
    vae: Any = None
    flushed = time.monotonic()

    def flush() -> None:
        nonlocal flushed, unwritten
        if unwritten:
            write_identities(folder, unwritten)
        flushed, unwritten = time.monotonic(), {}

    def prepared(todo: list[int], later: list[int]) -> Iterator[Tensors]:
        with closing(work_ahead(prepare, todo, encode.threads)) as ahead:
            for one in ahead:
                bar.update(one.sample not in found)
                found[one.sample] = one.found
                known.update(one.known)
                unwritten.update(one.known)
                if time.monotonic() - flushed > encode.flush_seconds:
                    flush()
                if isinstance(one.found, Skipped) and cache.data.on_error == "raise":
                    return
                for key, mask in one.masks:
                    writers["masks"].add(key, {"mask": mask})
                if not one.complete:
                    later.append(one.sample)
                names.update((key, samples[one.sample].name) for key, _ in one.pictures)
                yield one.pictures

    def settle() -> None:
        for writer in writers.values():
            writer.settle()

    def store(keys: list[str], fetch: Callable[[], list[Tensor]]) -> None:
        for key, *item in zip(keys, *fetch(), strict=True):
            for part in item:
                check_latents(part, names[key])
            deviation = {"deviation": item[1].clone()} if cache.sampled else {}
            writers["pictures"].add(key, {"mean": item[0].clone()} | deviation)

    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(todo), desc="pictures", unit="picture", disable=not show))
        stack.callback(flush)
        for each, later in rounds(todo, settle, lambda i: cache.absent(found[i])):
            before = None
            for batch in _batches(prepared(each, later), lambda height, width: encode.batch(height, width, device)):
                if vae is None:
                    vae = _ready(load(), encode)
                pixels = _onto(torch.stack([pixels for _, pixels in batch]), device)
                fetch = _fetching(to_posterior(vae, pixels))
                if before is not None:  # awaited only now, so that the device has its next work while this is stored
                    store(*before)
                before = [key for key, _ in batch], fetch
            if before is not None:
                store(*before)
    return found


def _ready(vae: Any, encode: Encode) -> Any:
    """The autoencoder, set up to encode."""
    if encode.tile:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = encode.tile, encode.tile // 8
    if vae.device.type == "cpu":  # oneDNN convolves this layout at 2.4 times the speed
        vae.to(memory_format=torch.channels_last)
    return vae


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


def _batches(parts: Iterable[Tensors], size: Callable[[int, int], int]) -> Iterator[Tensors]:
    """Views of one size together, `size(height, width)` of them; short batches when many wait, and at the end."""
    waiting: dict[tuple[int, int], Tensors] = {}
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
