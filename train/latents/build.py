"""Samples -> encoded samples, each encoded once and found by what it is.

The key of a picture is its decoded pixels, the crop and the autoencoder's weights; of a mask its pixels and the crop;
of a text its words, the T5 length, both encoders' weights and T5's precision (train/latents/keys.py). So a renamed file
costs nothing, and an edited one is never taken for the old one. Runs and processes share one folder
(train/latents/shards.py).
"""

import hashlib
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infer.checkpoint.load import Model, config_number, load_vae
from infer.device.device import release
from infer.program.remembered import Remembered
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from train.data.dataset import Data
from train.data.source import Faults, Sample
from train.latents.encoding import Seen, Work, encode_masks, encode_pictures, encode_texts
from train.latents.index import Fault, Index, Picture, identify
from train.latents.keys import make_keys
from train.latents.settings import Encode
from train.latents.shards import DamagedError, Shelf, hold, read_part, verify
from train.latents.store import Cache
from train.latents.workers import Gate, work_ahead
from train.latents.writer import Todo, Writer

RIGHT = "right"
Gather = Callable[[list[Any]], list[Any]]
"""Waits for all ranks and gives each the lists of all, one after another: accelerate's gather_object."""


def build(
    data: Data,
    samples: list[Sample],
    texts: list[str],
    model: Model,
    precision: Precision,
    encode: Encode,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    gather: Gather = list,
) -> Cache:
    """Encode what is not in the cache yet: pictures with the autoencoder, then masks, then texts with CLIP and T5. Each
    model is loaded only if there is something to encode, and freed; each rank does its share; all share data.cache.

    Batches, as other hardware, change latents within the rounding of bf16: what has a key is the same up to that.

    Raises:
        ValueError: a sample cannot be used and data.on_error is raise, or none can.
    """
    folder, main = Path(data.cache), rank == 0
    held = hold(folder)
    warn = partial(tqdm.write, file=sys.stderr)
    gate = Gate(encode.decode_pixels)
    (keys,) = gather([make_keys(model, precision, data.text_length, encode.tile)] if main else [])
    shift, scale = (config_number(model, "vae", name) for name in ("shift_factor", "scaling_factor"))
    cache = Cache(data, keys, shift, scale, held)
    remembered = Remembered(folder)
    index = Index(folder / "index", encode.flush_seconds, encode.threads, gate, warn, main, remembered)
    mine = range(rank, len(samples), ranks)
    with cache.timed("look"):
        known = gather(list(zip(mine, identify([samples[i] for i in mine], data, index), strict=True)))
    del index
    admit(cache, samples, dict(known))

    units: dict[str, list[Any]] = {
        "pictures": _first([picture.identity for picture in cache.pictures]),
        "masks": _first([picture.mask for picture in cache.pictures]),
        "texts": list(dict.fromkeys(texts)),
    }
    counts, todo, asked = {}, {}, {}
    for kind in units:
        shelf = Shelf(folder / kind, {key for unit in units[kind] for key in cache.entries(kind, unit)}, warn)
        cache.shelves[kind] = shelf
        own = units[kind][rank::ranks]
        used = shelf.wanted if ranks == 1 else {key for unit in own for key in cache.entries(kind, unit)}
        asked[kind] = used
        with cache.timed("check"):
            check(shelf, used, encode, gather, remembered)
        absent = used - shelf.found.keys()
        counts[f"{kind}_hits"], counts[f"{kind}_misses"] = len(used) - len(absent), len(absent)
        todo[kind] = [unit for unit in own if absent and not absent.isdisjoint(cache.entries(kind, unit))]

    def entries(kind: str) -> Iterator[Todo]:
        if kind == "texts":
            yield from (Todo(text, cache.entries(kind, text)) for text in todo[kind])
            return
        for i in sorted(todo[kind], key=lambda i: cache.views(i)[0][0].width):  # so that batches come together
            yield Todo(Seen(samples[cache.kept[i]], cache.pictures[i]), cache.entries(kind, i))

    @contextmanager
    def work(kind: str) -> Iterator[Work]:
        with cache.timed(kind), Writer(cache.shelves[kind], encode.shard_mib * 2**20, encode.flush_seconds) as writer:
            yield Work(writer, entries(kind), len(todo[kind]), encode, gate, main)

    if todo["pictures"]:
        vae = load_vae(model, device)
        with work("pictures") as own_pictures:
            encode_pictures(vae, own_pictures, data)
        del vae
        release(device)
    if todo["masks"]:
        with work("masks") as own_masks:
            encode_masks(own_masks, data)
    if todo["texts"]:
        with text_encoder(model, precision, device, data.text_length) as encoder, work("texts") as own_texts:
            encode_texts(encoder, own_texts)

    for own_counts in gather([counts]):  # here all wait for all
        for name, count in own_counts.items():
            cache.counts[name] = cache.counts.get(name, 0) + count
    for kind, shelf in cache.shelves.items():
        shelf.refresh()
        if shelf.wanted - shelf.found.keys():
            raise ValueError(
                f"{shelf.folder} lacks what another rank has encoded, or it was removed meanwhile; "
                "set data.cache to one folder that all ranks share, and start again"
            )
        if encode.verify:  # what was there has been compared, and the rest written just now
            for file, own_keys in shelf.by_shard(asked[kind]).items():
                remembered.value(file, _compared(own_keys), lambda: RIGHT)
        shelf.wanted = set()
    remembered.save()
    cache.truncated = gather(cut_texts(cache, units["texts"][rank::ranks]))
    return cache


def _first(names: list[Any]) -> list[int]:
    """The first place of each distinct name; None is none."""
    first: dict[Any, int] = {}
    for place, name in enumerate(names):
        if name is not None:
            first.setdefault(name, place)
    return list(first.values())


def admit(cache: Cache, samples: list[Sample], known: dict[int, Picture | Fault]) -> None:
    """Take into the cache the samples that can be used, by data.on_error.

    Raises:
        ValueError: one cannot, and the policy is to stop; or none can.
    """
    faults = Faults(cache.data.on_error)
    for i, sample in enumerate(samples):
        picture = known[i]
        try:
            if isinstance(picture, Fault):
                raise ValueError(picture.reason)
            cache.views_of(picture.width, picture.height)
        except ValueError as error:
            faults.add(sample.name, str(error))
        else:
            cache.kept.append(i)
            cache.pictures.append(picture)
    cache.skipped = faults.skipped
    if not cache.pictures:
        said = "; ".join(f"{skipped.name} {skipped.reason}" for skipped in faults.skipped[:3])
        raise ValueError(f"none of {len(samples)} samples can be used: {said}")


def check(shelf: Shelf, used: Collection[str], encode: Encode, gather: Gather, remembered: Remembered) -> None:
    """Find what is there, compared with its checksums if encode.verify, unless it was before and its file is as it was;
    a shard that any rank finds damaged counts for all as absent."""

    def compare(group: tuple[Path, list[str]]) -> DamagedError | None:
        file, keys = group

        def find() -> str:
            verify(file, set(keys))
            return RIGHT

        try:
            remembered.value(file, _compared(keys), find)
        except DamagedError as damage:
            return damage
        return None

    while True:
        damaged = [str(damage.file) for damage in shelf.refresh()]
        groups = shelf.by_shard(used).items() if encode.verify else []
        for damage in work_ahead(compare, groups, encode.threads):
            if damage:
                shelf.distrust(damage)
                damaged.append(str(damage.file))
        remembered.save()
        if not gather(damaged):
            return
        shelf.forget()


def _compared(keys: Collection[str]) -> str:
    """What is remembered of a shard whose items of these keys were compared with their checksums."""
    return f"checksums of {hashlib.sha256(''.join(sorted(keys)).encode()).hexdigest()}"


def cut_texts(cache: Cache, texts: list[str]) -> list[str]:
    """Those of the texts whose end T5 does not see."""
    names = {cache.keys.text(text): text for text in texts}
    cut = []
    for file, keys in cache.shelves["texts"].by_shard(names).items():
        for key, (tokens, seen) in read_part(file, keys, "tokens").items():
            if tokens > seen:
                cut.append(names[key])
    return cut
