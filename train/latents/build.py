"""Samples -> encoded samples, each encoded once and found by its content.

The key of a picture is its decoded pixels, the crop and the autoencoder's weights; of a mask its pixels and the crop;
of a text its words, its length in tokens, the encoders' weights and precision (train/latents/keys.py). So a renamed
file costs nothing, and an edited one is never taken for the old one. Runs and processes share one folder
(train/latents/shards.py).
"""

import hashlib
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infer.checkpoint.family import family_of, latent_map
from infer.checkpoint.load import load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.program.remembered import Remembered
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from train.data.dataset import Data
from train.data.source import Faults, Sample, Skipped
from train.latents.encoding import encode_pictures
from train.latents.identities import Picture
from train.latents.keys import make_keys
from train.latents.locks import hold
from train.latents.settings import Encode
from train.latents.shards import DamagedError, ShardIndex, read_part, verify
from train.latents.store import Cache
from train.latents.texts import encode_texts
from train.latents.workers import work_ahead
from train.latents.writer import ShardWriter

KINDS = ("pictures", "masks", "texts")
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
    """Encode what is not in the cache yet: pictures with the autoencoder and their masks, then texts with their
    encoders. Each model is loaded only if there is something to encode, and freed; each rank does its share; all share
    data.cache.

    Batches, as other hardware, change latents within the rounding of bf16: what has a key is the same up to that.

    Raises:
        ValueError: a sample cannot be used and data.on_error is raise, or none can.
    """
    folder, main = Path(data.cache), rank == 0
    held = hold(folder)
    warn = partial(tqdm.write, file=sys.stderr)
    (keys,) = gather([make_keys(model, precision, data.text_length, encode.tile)] if main else [])
    family = family_of(model)
    pooled = len(family.ENCODERS) > 1
    cache = Cache(data, keys, latent_map(model), family.SAMPLED, pooled, held, texts=list(dict.fromkeys(texts)))
    cache.indexes = {kind: ShardIndex(folder / kind, warn) for kind in KINDS}
    remembered = Remembered(folder)
    for index in cache.indexes.values():
        index.refresh()
    used: dict[str, set[str]] = {}  # keys that this rank encodes or finds
    mine = list(range(rank, len(samples), ranks))
    my_texts = {cache.keys.text(text): text for text in cache.texts[rank::ranks]}
    written: dict[str, set[str]] = {}
    missing: dict[str, set[str]] = {}

    def check_all(kind: str) -> set[str]:
        """Compare what was there with its checksums; returns what has to be encoded yet."""
        with cache.timed("check"):
            check(cache.indexes[kind], used[kind] - written.get(kind, set()), encode, gather, remembered)
        return cache.indexes[kind].absent(used[kind])

    def load() -> Any:
        with cache.timed("load"):
            return load_vae(model, device)

    with ExitStack() as stack:

        def open_writer(kind: str) -> ShardWriter:
            most = encode.shard_mib * 2**20
            writer = stack.enter_context(ShardWriter(cache.indexes[kind], most, encode.flush_seconds))
            missing[kind], written[kind] = writer.missing, writer.written
            return writer

        masked = any(sample.read_mask is not None for sample in samples)
        writers = {kind: open_writer(kind) for kind in (("pictures", "masks") if masked else ("pictures",))}
        found: dict[int, Picture | Skipped] = {}
        todo = mine
        while True:
            if todo:
                with cache.timed("pictures"):
                    found |= encode_pictures(cache, samples, todo, load, writers, remembered, encode, device, main)
                remembered.save()
                if "load" in cache.seconds:
                    release(device)
            pictures = {picture for picture in found.values() if isinstance(picture, Picture)}
            lost: set[str] = set()
            for kind in writers:
                used[kind] = {key for picture in pictures for key in cache.all_keys_of(kind, picture)}
                lost |= check_all(kind)
            stopped = data.on_error == "raise" and any(isinstance(picture, Skipped) for picture in found.values())
            todo = [i for i, picture in found.items() if cache.absent(picture)] if lost and not stopped else []
            if not any(gather([bool(todo)])):  # else something was damaged
                break
        admit(cache, samples, dict(gather(list(found.items()))))

        used["texts"] = set(my_texts)
        if lost := check_all("texts"):
            texts = [text for key, text in my_texts.items() if key in lost]
            with text_encoder(model, precision, device, data.text_length) as encoder, cache.timed("texts"):
                encode_texts(cache, encoder, texts, open_writer("texts"), main)

    every = gather([missing])  # here all wait for all
    for kind, index in cache.indexes.items():
        index.refresh()
        wanted = cache.all_keys(kind) if ranks > 1 else used.get(kind, set())
        if index.absent(wanted):
            raise ValueError(
                f"{index.folder} lacks what another rank has encoded, or it was removed meanwhile; "
                "set data.cache to one folder that all ranks share, and start again"
            )
        misses = len(wanted & set().union(*(of_rank.get(kind, set()) for of_rank in every)))
        cache.counts[f"{kind}_hits"], cache.counts[f"{kind}_misses"] = len(wanted) - misses, misses
        if encode.verify:  # what was there has been compared, and the rest written just now
            for file, own_keys in index.by_shard(used.get(kind, set())).items():
                remembered.value(file, _compared(own_keys), lambda: RIGHT)
    remembered.save()
    cache.truncated = gather(cut_texts(cache, cache.texts[rank::ranks]))
    return cache


def admit(cache: Cache, samples: list[Sample], found: dict[int, Picture | Skipped]) -> None:
    """Take into the cache the samples that can be used, by data.on_error.

    Raises:
        ValueError: one cannot, and the policy is to stop; or none can.
    """
    faults = Faults(cache.data.on_error)
    for i, sample in enumerate(samples):
        picture = found[i]
        if isinstance(picture, Skipped):
            faults.add(sample.name, picture.reason)
        else:
            cache.kept.append(i)
            cache.pictures.append(picture)
    cache.skipped = faults.skipped
    if not cache.pictures:
        said = "; ".join(f"{skipped.name} {skipped.reason}" for skipped in faults.skipped[:3])
        raise ValueError(f"none of {len(samples)} samples can be used: {said}")


def check(index: ShardIndex, used: Collection[str], encode: Encode, gather: Gather, remembered: Remembered) -> None:
    """Read the index of the shards. With encode.verify each shard is compared with its checksums, unless it was before
    and its file has not changed. A shard that any rank finds damaged counts as absent for all."""

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
        damaged = [str(damage.file) for damage in index.refresh()]
        groups = index.by_shard(used).items() if encode.verify else []
        for damage in work_ahead(compare, groups, encode.threads):
            if damage:
                index.distrust(damage)
                damaged.append(str(damage.file))
        remembered.save()
        if not gather(damaged):
            return
        index.forget()


def _compared(keys: Collection[str]) -> str:
    """What is remembered of a shard whose items of these keys were compared with their checksums."""
    return f"checksums of {hashlib.sha256(''.join(sorted(keys)).encode()).hexdigest()}"


def cut_texts(cache: Cache, texts: list[str]) -> list[str]:
    """Those of the texts whose end the text encoder does not see."""
    names = {cache.keys.text(text): text for text in texts}
    cut = []
    for file, keys in cache.indexes["texts"].by_shard(names).items():
        for key, (tokens, seen) in read_part(file, keys, "tokens").items():
            if tokens > seen:
                cut.append(names[key])
    return cut
