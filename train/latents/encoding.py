"""Samples and texts that are not in the cache yet -> shards.

Threads read ahead: a file's bytes are hashed; what these bytes are known to decode to, and is in the cache, is done.
Else they are decoded, hashed and cut to the sample's views at once, so that a new picture is read and decoded once. The
autoencoder takes the views in batches of one size. Texts are encoded one by one.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infer.program.remembered import Remembered
from infer.quantize.compute import compute_dtype, small_dtype
from infer.sample.encode import TextEncoder, to_posterior
from infer.sample.picture import decode, pixel_hash, pixels_of
from train.data.buckets import View, cut, cut_mask
from train.data.mask import decode_mask
from train.data.source import Reference, Sample, Skipped
from train.latents.identities import Picture, Shown, digest, digest_file, known_identities, write_identities
from train.latents.settings import Encode
from train.latents.store import Cache
from train.latents.workers import make_room, work_ahead
from train.latents.writer import ShardWriter, rounds

MASK = "its mask"  # as messages name it, after the sample's name
MOST_WAITING = 16  # sizes of which a batch is begun
Tensors = list[tuple[str, Tensor]]
"""Key and pixels of each view."""


class Prepared(NamedTuple):
    """A sample, read as far as it has to be."""

    sample: int
    found: Picture | Skipped
    known: dict[bytes, Picture]
    """What was learned of the bytes that were decoded."""
    pictures: Tensors
    """Absent views, [3, height, width] in [-1, 1]."""
    masks: Tensors
    """Absent views of the mask, [height / 8, width / 8] in [0, 1]."""
    complete: bool
    """Whether no other process or thread is making a view of this sample."""


def make_preparer(
    cache: Cache,
    samples: list[Sample],
    writers: dict[str, ShardWriter],
    remembered: Remembered,
    identity: Callable[[bytes], Picture | None],
    encode: Encode,
    dtype: torch.dtype,
) -> Callable[[int], Prepared]:
    """A function, for threads, that reads a sample, and decodes and cuts its picture and its mask where it has to.

    identity: what some bytes decode to, by their digest, where that is known. dtype: of the pictures' pixels.
    """
    data, room = cache.data, make_room(encode.decode_pixels)

    def prepare(i: int) -> Prepared:
        sample, known, complete = samples[i], dict[bytes, Picture](), True
        claimed: list[tuple[ShardWriter, set[str]]] = []

        def claim(kind: str, views: dict[str, View]) -> dict[str, View]:
            nonlocal complete
            mine, rest = writers[kind].claim(views.keys())
            claimed.append((writers[kind], mine))
            complete = complete and rest
            return {key: view for key, view in views.items() if key in mine}

        def load(
            kind: str,
            given: tuple[bytes, bytes | None],
            read: Callable[[], bytes],
            settings: tuple[object, ...],
            open_picture: Callable[[bytes], Image.Image],
            crop: Callable[[Image.Image, View], Tensor],
            part_of: Callable[[Picture], Picture],
            keys_of: Callable[[Picture], dict[str, View]],
            least: int = 0,
        ) -> tuple[Picture, Tensors]:
            """What the sample's picture is with this part of it, and the part's absent views.

            Args:
                given: digest and bytes.
                part_of: what is found -> the sample's picture with it.
                keys_of: the sample's picture -> the part's views by their keys.
                least: pixels that are decoded, whatever its header says.
            """
            key, content = given
            found = identity(key)
            if kind == "pictures" and found is not None and found.width * found.height > data.most_pixels:
                found = None  # decoding says that it is too large
            views, picture = dict[str, View](), None
            if found is not None:
                picture = part_of(found)
                views = claim(kind, keys_of(picture))
                if not views:
                    return picture, []
            if content is None:
                content = read()
                if digest(content, *settings) != key:
                    raise ValueError("changed while it was being read; start again")
            size = least if found is None else max(least, found.width * found.height)
            with room(max(pixels_of(content), size)):
                opened = open_picture(content)
                if found is None:
                    known[key] = Picture(pixel_hash(opened), *opened.size)
                    picture = part_of(known[key])
                    views = claim(kind, keys_of(picture))
                assert picture is not None
                return picture, [(key, crop(opened, view)) for key, view in views.items()]

        def load_reference(picture: Picture, number: int, reference: Reference) -> tuple[Picture, Tensors]:
            settings = "picture", data.background
            name = f"has the reference {reference.name}, which"

            def keys_of(picture: Picture) -> dict[str, View]:
                try:
                    return cache.reference_keys(picture, number)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from error

            return load(
                "pictures",
                digest_file(reference.file, reference.read, remembered, *settings),
                reference.read,
                settings,
                lambda content: decode(content, name, data.background, data.most_pixels),
                lambda opened, view: cut(opened, view).to(dtype),
                lambda found: picture._replace(references=(*picture.references, Shown(*found[:3]))),
                keys_of,
            )

        try:
            settings: tuple[object, ...] = "picture", data.background
            given = digest_file(sample.file, sample.read, remembered, *settings)
            picture, pictures = load(
                "pictures",
                given,
                sample.read,
                settings,
                lambda content: decode(content, sample.name, data.background, data.most_pixels),
                lambda opened, view: cut(opened, view).to(dtype),
                lambda found: found,
                lambda picture: cache.keys_of("pictures", picture),
            )
            for number, reference in enumerate(sample.references):
                picture, shown = load_reference(picture, number, reference)
                pictures += shown
            masks: Tensors = []
            if sample.read_mask is not None:
                settings, size = ("mask", given[0]), (picture.width, picture.height)
                picture, masks = load(
                    "masks",
                    digest_file(sample.mask_file, sample.read_mask, remembered, *settings),
                    sample.read_mask,
                    settings,
                    lambda content: decode_mask(content, MASK, size, data.most_pixels),
                    cut_mask,
                    partial(_masked, picture),
                    lambda picture: cache.keys_of("masks", picture),
                    picture.width * picture.height,
                )
        except (ValueError, OSError) as error:
            for writer, keys in claimed:
                writer.give_up(keys)
            reason = str(error).removeprefix(sample.name).strip()
            return Prepared(i, Skipped(sample.name, reason), known, [], [], True)
        return Prepared(i, picture, known, pictures, masks, complete)

    return prepare


def _masked(picture: Picture, mask: Picture) -> Picture:
    return picture._replace(mask=mask.identity)


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
    """Write what the cache lacks of these samples, and return what each of them is: of every missing view the posterior
    (`mean` and, where the family is trained on samples of it, `deviation`, [channels, h / 8, w / 8], as the autoencoder
    gives it), of a mask's views `mask`,
    [h / 8, w / 8] in [0, 1]. Under data.on_error=raise it stops at the first sample that cannot be used.

    load: gives the autoencoder, and is called when the first view has to be encoded. writers: by kind.
    """
    folder = cache.folder / "index"
    stored = known_identities(folder, cache.indexes["pictures"].warn)
    known: dict[bytes, Picture] = {}  # what was learned here
    unwritten: dict[bytes, Picture] = {}
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
                yield one.pictures

    def settle() -> None:
        for writer in writers.values():
            writer.settle()

    def store(keys: list[str], fetch: Callable[[], list[Tensor]]) -> None:
        for key, *item in zip(keys, *fetch(), strict=True):
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


def encode_texts(cache: Cache, encoder: TextEncoder, texts: list[str], writer: ShardWriter, show: bool) -> None:
    """Write the embeddings of the texts that are missing, one by one so that none depends on its neighbours: `embeds`
    [tokens, width], `pooled` [width] where there is one, and `tokens`: what the whole text has, and what is seen of it
    at most."""

    def absent(text: str) -> bool:
        return bool(writer.index.absent([cache.keys.text(text)]))

    with tqdm(total=len(texts), desc="texts", unit="text", disable=not show) as bar:
        for todo, later in rounds(texts, writer.settle, absent):
            for text in todo:
                mine, complete = writer.claim([cache.keys.text(text)])
                if not complete:
                    later.append(text)
                    continue
                for key in mine:
                    (encoded,) = encoder([text])
                    tokens = torch.tensor([encoder.tokens(text), encoder.length], dtype=torch.int32)
                    pooled = {} if encoded.pooled is None else {"pooled": encoded.pooled.clone()}
                    writer.add(key, {"embeds": encoded.embeds.clone(), "tokens": tokens} | pooled)
                bar.update()
