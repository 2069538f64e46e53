"""Cached samples against diffusers' own autoencoder and pipeline; keys against every way to take one for another."""

import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from infer.checkpoint.model import Model
from infer.family.family import LatentMap
from infer.program.paths import ROOT
from infer.program.remembered import NAME
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision
from infer.sample.picture import decode, pixel_hash
from tests.forked import Forked
from train.data.caption import all_texts
from train.data.dataset import Data, Prior
from train.data.samples import read_samples
from train.data.source import Sample, Source
from train.data.view import View
from train.latents import build as build_module
from train.latents.build import build
from train.latents.identities import Picture, digest, known_identities
from train.latents.keys import Keys, make_keys
from train.latents.prior import prior_folder
from train.latents.prune import folders_used, prune_cache
from train.latents.settings import Encode
from train.latents.shards import list_shards, read_keys
from train.latents.store import Cache
from train.latents.users import forget_gone, record_use, uses

CPU = torch.device("cpu")
BF16 = Precision("bf16")
FAST = Encode(workers=2)
CAPTIONS = {"a.png": "a red star", "a.jpg": "a red star", "b c.png": "two blue hearts", "d.png": "a very green circle"}
SIZES = {"a.png": (40, 36), "a.jpg": (40, 36), "b c.png": (36, 70), "d.png": (64, 64)}


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Smooth, so that no two are alike to the autoencoder."""
    small = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        picture(i, SIZES[name]).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    return Data(str(folder), resolution=32, cache=str(tmp_path / "cache"))


def make(data: Data, model: Model, samples: list[Sample] | None = None, **options: Any) -> Cache:
    samples = read_samples(data)[0] if samples is None else samples
    texts = [*all_texts(samples, data), *options.pop("more", ["a prompt"])]
    rest: dict[str, Any] = {"precision": BF16, "encode": FAST, "device": CPU} | options
    return build(data, samples, texts, model, **rest)


def files(data: Data) -> dict[str, int]:
    """Every file in the cache with the time at which it was written, but for what is remembered of files."""
    found = [path for path in Path(data.cache).rglob("*") if path.is_file() and NAME not in path.name]
    return {path.relative_to(data.cache).as_posix(): path.stat().st_mtime_ns for path in found}


def name_of(sample: Sample) -> str:
    return Path(sample.name).name


def misses(cache: Cache) -> tuple[int, int]:
    return cache.counts["pictures_misses"], cache.counts["texts_misses"]


def reference_vae(model: Model, layout: torch.memory_format = torch.channels_last) -> Any:
    """Weights of bf16, in the dtype that this CPU computes in. The layout changes the order of sums, and with it
    roundings."""
    vae: Any = AutoencoderKL.from_pretrained(model.path, subfolder="vae", torch_dtype=torch.bfloat16)
    return vae.to(compute_dtype(torch.bfloat16, CPU), memory_format=layout)


def reference_encoders(model: Model) -> Any:
    """diffusers' text encoders: weights of bf16, in the dtype that this CPU computes in."""
    pipeline = FluxPipeline.from_pretrained(model.path, transformer=None, vae=None, torch_dtype=torch.bfloat16)
    return pipeline.to(compute_dtype(torch.bfloat16, CPU))


def by_hand(vae: Any, file: Path, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """A view's latents by Pillow, NumPy and diffusers alone, one by one."""
    square = Image.open(file).convert("RGB")
    pixels = np.asarray(square.resize((view.width, view.height), Image.Resampling.LANCZOS, box=view.box))
    pixels = pixels[:, ::-1].copy() if view.flip else pixels
    batch = torch.tensor(pixels).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(batch.to(vae.dtype)).latent_dist
    mean, deviation = (part[0].bfloat16().float() for part in (posterior.mean, posterior.std))  # as they are stored
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor, deviation * vae.config.scaling_factor


def check(cache: Cache, samples: list[Sample], model: Model) -> list[torch.Tensor]:
    """Every view of every sample is diffusers' encoding of its own picture, and its captions' of its own captions."""
    vae = reference_vae(model)
    pipeline = reference_encoders(model)
    means = {}
    for i, kept in enumerate(cache.kept):
        for views in cache.views(i):
            for view in views:
                mean, deviation = cache.picture(i, view)
                assert mean.dtype == deviation.dtype == torch.float32
                expected = by_hand(vae, Path(samples[kept].name), view)
                torch.testing.assert_close((mean, deviation), expected, rtol=1e-5, atol=1e-5)
                means[cache.identity(i), view] = mean
        caption = CAPTIONS[name_of(samples[kept])]
        assert samples[kept].captions == (caption,)
        text = cache.text(caption)
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(caption, None, max_sequence_length=len(text.embeds))
        assert text.pooled is not None
        assert torch.equal(text.embeds, embeds[0].bfloat16()) and torch.equal(text.pooled, pooled[0].bfloat16())
    return list(means.values())


def test_samples_are_what_diffusers_encodes_after_any_shuffle(data: Data, tiny: Model) -> None:
    data = replace(data, resolution=[32, 48], flip=True, crops=2)
    samples, _ = read_samples(data)
    make(data, tiny, samples)
    for seed in (3, 4):
        random.Random(seed).shuffle(samples)
        cache = make(data, tiny, samples)
        assert misses(cache) == (0, 0)
        means = check(cache, samples, tiny)
    assert len(means) > 4 * 2 * 2 and len({mean.shape for mean in means}) > 2
    apart = [(a - b).abs().max() for i, a in enumerate(means) for b in means[:i] if a.shape == b.shape]
    assert min(apart) > 0.02  # so the tolerance tells them from each other, mirrored ones too


def test_second_start_reads_neither_pictures_nor_encodings(
    data: Data, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written a moment ago would be read again, so here it is taken for older."""
    monkeypatch.setattr("infer.program.remembered.RECENT", -1.0)
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, name in enumerate(CAPTIONS):
        picture(9 + i, SIZES[name]).convert("L").save(masks / name)
    data = replace(data, masks=str(masks))
    verified: list[Path] = []
    real = build_module.verify
    monkeypatch.setattr(build_module, "verify", lambda file, keys: (verified.append(file), real(file, keys)))

    def start() -> tuple[Cache, list[str]]:
        read: list[str] = []

        def noting(sample: Sample, name: str) -> Any:
            content = getattr(sample, name)
            return lambda: (read.append(f"{name} {name_of(sample)}"), content())[1]

        samples = [replace(s, read=noting(s, "read"), read_mask=noting(s, "read_mask")) for s in read_samples(data)[0]]
        return make(data, tiny, samples), read

    first, read = start()
    assert sorted(read) == sorted(f"{what} {name}" for what in ("read", "read_mask") for name in CAPTIONS)  # once each
    verified.clear()
    second, read = start()
    assert read == [] and verified == [] and misses(second) == (0, 0)
    assert [p.identity for p in second.pictures] == [p.identity for p in first.pictures]

    time.sleep(0.02)
    other = Path(data.path, "d.png")
    before = other.stat()
    content = other.read_bytes()
    other.write_bytes(content)  # the same again: read, and found to be the same
    assert start()[1] == ["read d.png"]
    picture(50, SIZES["d.png"]).save(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    third, read = start()
    assert read.count("read d.png") == 1 and misses(third)[0] == 1
    shard = list_shards(Path(data.cache, "pictures"))[0]
    stored = bytearray(shard.read_bytes())
    stored[-1] ^= 1
    shard.write_bytes(stored)
    mended, _ = start()
    assert shard in verified and misses(mended)[0] >= 1


def test_a_new_picture_is_read_and_decoded_once(data: Data, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its views are. Rows of tables have no file of their own, and are read at every start."""
    shutil.copy(Path(data.path, "d.png"), Path(data.path, "e.png"))  # the same bytes, under another name
    Path(data.path, "e.txt").write_text("a copy")
    reads, decoded = Counter[str](), Counter[str]()

    def counting(sample: Sample) -> Sample:
        def read() -> bytes:
            reads[name_of(sample)] += 1
            return sample.read()

        return replace(sample, read=read, file=None)

    def decoding(content: bytes, name: str, *rest: Any) -> Image.Image:
        decoded[Path(name).name] += 1
        return decode(content, name, *rest)

    monkeypatch.setattr("train.latents.prepare.decode", decoding)
    samples = [counting(sample) for sample in read_samples(data)[0]]
    several = replace(data, resolution=[32, 48], flip=True, crops=2)
    built = make(several, tiny, samples, encode=Encode(workers=1))
    once = dict.fromkeys((*CAPTIONS, "e.png"), 1)
    assert dict(reads) == once and built.counts["pictures_misses"] > 12
    assert decoded.keys() >= set(CAPTIONS) and set(decoded.values()) == {1}
    for more, expected in (([], 0), ([16], 4)):  # known: decoded only where a view is absent
        reads.clear()
        decoded.clear()
        make(replace(several, resolution=[32, 48, *more]), tiny, samples)
        assert dict(reads) == once and set(decoded.values()) <= {1} and len(decoded) in (expected, expected and 5)


def test_the_first_broken_picture_stops_the_build_and_what_was_encoded_stays(data: Data, tiny: Model) -> None:
    Path(data.path, "b c.png").write_bytes(b"no picture")
    Path(data.path, "d.png").write_bytes(b"neither")
    samples, _ = read_samples(data)
    with pytest.raises(ValueError, match=r"b c.png cannot be read as a picture"):
        make(data, tiny, samples, encode=Encode(workers=1))
    there = [key for file in list_shards(Path(data.cache, "pictures")) for key in read_keys(file)]
    assert len(there) == 2  # a.jpg and a.png
    picture(2, SIZES["b c.png"]).save(Path(data.path, "b c.png"))
    picture(3, SIZES["d.png"]).save(Path(data.path, "d.png"))
    cache = make(data, tiny, samples)
    assert misses(cache) == (2, 4)
    check(cache, samples, tiny)


def test_second_build_encodes_nothing(data: Data, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(data, tiny)
    before = files(data)
    assert misses(first) == (4, 4)  # of texts three captions and a prompt: two share one

    def never(*args: object, **options: object) -> None:
        raise AssertionError("something is encoded")

    monkeypatch.setattr(build_module, "load_vae", never)
    monkeypatch.setattr(build_module, "text_encoder", never)
    monkeypatch.setattr("train.latents.prepare.decode", never)
    second = make(data, tiny)
    assert misses(second) == (0, 0) and second.counts["pictures_hits"] == second.counts["texts_hits"] == 4
    assert files(data) == before
    with pytest.raises(AssertionError, match="something is encoded"):
        make(data, tiny, more=["another"])


def test_renaming_costs_nothing_and_an_edit_is_seen(data: Data, tiny: Model) -> None:
    folder = Path(data.path)
    picture(0).save(folder / "e.bmp")  # a.png again, under another format: encoded once
    (folder / "e.txt").write_text("a red star")
    samples, _ = read_samples(data)
    cache = make(data, tiny, samples)
    names = {name_of(sample): cache.identity(i) for i, sample in enumerate(samples)}
    assert misses(cache) == (4, 4) and names["e.bmp"] == names["a.png"] != names["a.jpg"]
    before = files(data)

    (folder / "a.png").rename(folder / "d e.png")
    (folder / "a.txt").rename(folder / "d e.txt")
    (folder / "a.jpg").unlink()
    samples, _ = read_samples(data)
    cache = make(data, tiny, samples)
    assert misses(cache) == (0, 0) and files(data) == before
    place = [name_of(sample) for sample in samples].index("d e.png")
    assert cache.identity(place) == names["a.png"]

    bitmap = folder / "e.bmp"  # not compressed: the same length for any content
    status = bitmap.stat()
    picture(9).save(bitmap)
    os.utime(bitmap, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (bitmap.stat().st_size, bitmap.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    samples, _ = read_samples(data)
    place = [name_of(sample) for sample in samples].index("e.bmp")
    cache = make(data, tiny, samples)
    assert misses(cache) == (1, 0) and cache.identity(place) not in names.values()
    (view,) = cache.views(place)[0]
    expected = by_hand(reference_vae(tiny), bitmap, view)
    torch.testing.assert_close(cache.picture(place, view), expected, rtol=1e-5, atol=1e-5)

    (folder / "e.txt").write_text("a red ring")
    assert misses(make(data, tiny)) == (0, 1)
    (folder / "d.png").rename(folder / "swap")  # two pictures trade their names: their captions stay with the names
    (folder / "b c.png").rename(folder / "d.png")
    (folder / "swap").rename(folder / "b c.png")
    samples, _ = read_samples(data)
    cache = make(data, tiny, samples)
    assert misses(cache) == (0, 0)
    place = [name_of(sample) for sample in samples].index("d.png")
    assert samples[place].captions == ("a very green circle",) and cache.pictures[place][1:3] == SIZES["b c.png"]


def perturbed(model: Model, part: str, folder: Path) -> Model:
    """A copy of a checkpoint with one number of one tensor changed."""
    shutil.copytree(Path(model.path).resolve(), folder)
    if part == "tokenizer":
        settings = folder / "tokenizer_2" / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("{", '{"note": 1,', 1))
        return Model(str(folder))
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return Model(str(folder))


def test_only_what_changed_is_encoded_again(data: Data, tiny: Model, tmp_path: Path) -> None:
    make(data, tiny)
    t5 = Precision("bf16", t5="int8")
    assert misses(make(data, tiny, precision=t5)) == (0, 4)
    assert misses(make(data, tiny, precision=t5)) == (0, 0)
    other = perturbed(tiny, "vae", tmp_path / "copy")
    samples, _ = read_samples(data)
    cache = make(data, other, samples)
    assert misses(cache) == (4, 0)
    check(cache, samples, other)
    old, samples = make(data, tiny), read_samples(data)[0]  # the old encodings are still there, and still right
    assert misses(old) == (0, 0)
    check(old, samples, tiny)
    assert misses(make(replace(data, resolution=[32, 16]), tiny)) == (4, 0)
    assert misses(make(replace(data, text_length=7), tiny)) == (0, 4)
    assert misses(make(replace(data, batch_size=3, validation=0.5, trigger=None), tiny)) == (0, 0)


def keys_of(data: Data, model: Model, precision: Precision, encode: Encode) -> tuple[list[str], list[str]]:
    """All keys, with nothing encoded."""
    keys = make_keys(model, precision, data.text_length, encode.tile)
    samples, _ = read_samples(data)
    opened = [decode(sample.read(), sample.name, data.background) for sample in samples]
    with Path(os.devnull).open("rb") as nothing:
        cache = Cache(data, keys, LatentMap(0.0, 1.0), True, True, nothing)
    pictures = [key for each in opened for key in cache.keys_of("pictures", Picture(pixel_hash(each), *each.size))]
    return pictures, [keys.text(text) for text in all_texts(samples, data)]


@pytest.mark.parametrize(
    "change, pictures, texts",
    [
        ("vae", True, False),
        ("text_encoder", False, True),
        ("text_encoder_2", False, True),
        ("transformer", False, False),
        ("tokenizer", False, True),
        ({"resolution": 48}, True, False),
        ({"crops": 2}, True, False),
        ({"text_length": 7}, False, True),
        ({"background": "black"}, False, False),
        (Precision("nf4"), False, True),
        (Precision("bf16", t5="int8"), False, True),
        (Precision("nf4", t5="bf16", skip_modules=["proj_out"]), False, False),
        ({"batch_size": 3, "validation": 0.5}, False, False),
        (Encode(tile=1024, batch_pixels=9, workers=1, shard_mib=1), False, False),
    ],
)
def test_what_changes_a_key(data: Data, tiny: Model, tmp_path: Path, change: Any, pictures: bool, texts: bool) -> None:
    shutil.copy(Path(data.path, "b c.png"), Path(data.path, "only wide.png"))
    for name in CAPTIONS:
        Path(data.path, name).unlink()
    Path(data.path, "only wide.txt").write_text("a wide one")
    before = keys_of(data, tiny, BF16, FAST)
    model, precision, encode = tiny, BF16, FAST
    if isinstance(change, Precision):
        precision = change
    elif isinstance(change, Encode):
        encode = change
    elif isinstance(change, dict):
        data = replace(data, **change)
    else:
        model = perturbed(tiny, change, tmp_path / "copy")
    after = keys_of(data, model, precision, encode)
    assert (not set(before[0]) & set(after[0])) == pictures and (set(before[0]) == set(after[0])) != pictures
    assert (not set(before[1]) & set(after[1])) == texts and (set(before[1]) == set(after[1])) != texts


VIEWS = st.builds(
    View,
    st.integers(1, 9).map(lambda n: 16 * n),
    st.integers(1, 9).map(lambda n: 16 * n),
    st.tuples(*[st.floats(0, 100, allow_nan=False)] * 4),
    st.booleans(),
)


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), VIEWS), min_size=2, max_size=6), st.sampled_from([0, 64]))
def test_keys_are_equal_only_for_equal_things(items: list[tuple[str, View]], tile: int) -> None:
    keys = Keys("vae", tile, "encoders")
    other = Keys("another", tile, "others")
    for kind in (keys.picture, keys.mask):
        made = [kind(*item) for item in items]
        assert [[a == b for b in made] for a in made] == [[a == b for b in items] for a in items]
    assert not {keys.picture(*item) for item in items} & {other.picture(*item) for item in items}
    assert {keys.mask(*item) for item in items} == {other.mask(*item) for item in items}
    tiled = Keys("vae", 32, "encoders")
    for identity, view in items:
        whole = max(view.height, view.width) <= 32
        assert (tiled.picture(identity, view) == Keys("vae", 0, "encoders").picture(identity, view)) == whole


@given(st.lists(st.text(), min_size=2, max_size=6))
def test_text_keys_are_equal_only_for_equal_texts(texts: list[str]) -> None:
    keys = [Keys("vae", 0, "encoders").text(text) for text in texts]
    assert [[a == b for b in keys] for a in keys] == [[a == b for b in texts] for a in texts]
    assert not {Keys("vae", 0, "others").text(text) for text in texts} & set(keys)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([1, 7, 255]))
def test_identity_is_of_the_pixels_alone(width: int, height: int, seed: int, place: int, change: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    own = pixel_hash(Image.fromarray(pixels))
    edited = pixels.copy()
    edited.reshape(-1)[place % edited.size] ^= change
    assert pixel_hash(Image.fromarray(edited)) != own == pixel_hash(Image.fromarray(pixels.copy()))
    turned = pixels.reshape(width, height, 3)
    assert (pixel_hash(Image.fromarray(turned)) == own) == (width == height)


def test_batches_are_equal_within_the_rounding_of_bf16(data: Data, tiny: Model) -> None:
    """Batches, and another layout of the weights, sum in another order; bf16 keeps 8 bits, so that a number may come
    out one step of 2^-7 apart."""
    data = replace(data, resolution=[32, 64], flip=True, crops=2)
    samples, _ = read_samples(data)
    one = make(data, tiny, samples)
    many = make(replace(data, cache=data.cache + "2"), tiny, samples, encode=replace(FAST, batch_pixels=4 * 64 * 64))
    plain = reference_vae(tiny, torch.contiguous_format)
    compared = 0
    for i, sample in enumerate(samples):
        for views in one.views(i):
            for view in views:
                own = one.picture(i, view)
                for other in (many.picture(i, view), by_hand(plain, Path(sample.name), view)):
                    for a, b in zip(own, other, strict=True):
                        assert (a - b).abs().max() <= 2**-7 * (a.abs().max() + 0.1)
                        assert (a - b).abs().mean() <= 2**-9 * a.abs().mean() + 1e-5
                        compared += 1
    assert compared >= 2 * 2 * 4 * 2 * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_the_same_within_its_rounding(data: Data, tiny: Model) -> None:
    """Pinned copies both ways that nobody waits for: each result must be its own picture's, and whole."""
    for seed in range(40):
        picture(100 + seed, (48, 48)).save(Path(data.path, f"more {seed}.png"))
        Path(data.path, f"more {seed}.txt").write_text("a red star")
    data = replace(data, resolution=[32, 48], flip=True)
    samples, _ = read_samples(data)
    cuda = make(data, tiny, samples, device=torch.device("cuda"), encode=Encode(batch_pixels=3 * 48 * 48))
    vae = reference_vae(tiny)
    for i, sample in enumerate(samples):
        for views in cuda.views(i):
            for view in views:
                expected = by_hand(vae, Path(sample.name), view)
                for a, b in zip(cuda.picture(i, view), expected, strict=True):
                    assert (a - b).abs().max() <= 2**-5 * (b.abs().max() + 0.1)
                    assert (a - b).abs().mean() <= 2**-7 * b.abs().mean() + 1e-4


def test_large_pictures_are_encoded_in_tiles(data: Data, tiny: Model) -> None:
    data = replace(data, resolution=[32, 96], upscale=True)
    samples, _ = read_samples(data)
    whole = make(data, tiny, samples)
    tiled = make(data, tiny, samples, encode=replace(FAST, tile=64))
    large = sum(max(view.height, view.width) > 64 for i in range(4) for views in whole.views(i) for view in views)
    assert large == 4 and misses(tiled) == (4, 0)
    vae = reference_vae(tiny)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    for i, sample in enumerate(samples):
        for (view,) in whole.views(i):
            expected = by_hand(vae, Path(sample.name), view)
            torch.testing.assert_close(tiled.picture(i, view), expected, rtol=1e-5, atol=1e-5)
            differs = not torch.equal(whole.picture(i, view)[0], tiled.picture(i, view)[0])
            assert differs == (max(view.height, view.width) > 64)


def test_truncated_and_empty_texts(data: Data, tiny: Model) -> None:
    data = replace(data, caption_dropout=0.1, text_length=4)
    long = "a very green circle and more words than four"
    Path(data.path, "d.txt").write_text(long)
    samples, _ = read_samples(data)
    for _ in range(2):  # encoded, and found
        cache = make(data, tiny, samples, more=["", "a prompt"])
        assert long in cache.truncated and "" not in cache.truncated
        tokenize = FluxPipeline.from_pretrained(tiny.path, transformer=None, vae=None).tokenizer_2
        texts = {*all_texts(samples, data), "a prompt"}
        assert set(cache.truncated) == {text for text in texts if len(tokenize(text).input_ids) > 4}
    assert cache.counts["texts_hits"] == len(texts) and "" in texts  # the empty one once
    assert cache.text("").embeds.shape[0] == 4


def grey(seed: int, size: tuple[int, int]) -> Image.Image:
    return picture(seed, size).convert("L")


def test_masks_are_their_own(data: Data, tiny: Model, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, name in enumerate(("b c.png", "d.png")):
        grey(20 + i, SIZES[name]).save(masks / name)
    data = replace(data, masks=str(masks), flip=True)
    samples, _ = read_samples(replace(data, masks=None))
    with_masks = {"b c.png": masks / "b c.png", "d.png": masks / "d.png"}
    samples = [
        replace(sample, read_mask=with_masks[name_of(sample)].read_bytes) if name_of(sample) in with_masks else sample
        for sample in samples
    ]
    cache = make(data, tiny, samples)
    assert cache.counts["masks_misses"] == 2 * 2
    for i, sample in enumerate(samples):
        for view in cache.views(i)[0]:
            mask = cache.mask(i, view)
            if name_of(sample) not in with_masks:
                assert mask is None
                continue
            whole = Image.open(with_masks[name_of(sample)])
            small = whole.resize((view.width // 8, view.height // 8), Image.Resampling.BOX, box=view.box)
            expected = np.asarray(small)[:, ::-1] if view.flip else np.asarray(small)
            assert mask is not None and np.array_equal((mask * 255).round().numpy(), expected)
    grey(30, SIZES["d.png"]).save(masks / "d.png")
    again = make(data, tiny, samples)
    assert (again.counts["masks_hits"], again.counts["masks_misses"]) == (2, 2) and misses(again) == (0, 0)
    grey(31, (SIZES["d.png"][0], 9)).save(masks / "d.png")
    with pytest.raises(ValueError, match=r"d.png its mask is 64x9.*give both the same shape"):
        make(data, tiny, samples)


def test_what_cannot_be_used_is_named(data: Data, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    samples, _ = read_samples(data)
    Path(data.path, "a.jpg").write_bytes(b"no picture")
    picture(7, (9, 40)).save(Path(data.path, "b c.png"))
    with pytest.raises(ValueError, match=r"a.jpg cannot be read as a picture"):
        make(data, tiny, samples)
    skip = replace(data, on_error="skip")
    cache = make(skip, tiny, samples)
    assert [(Path(s.name).name, s.reason.split(",")[0].split(" (")[0]) for s in cache.skipped] == [
        ("a.jpg", "cannot be read as a picture"),
        ("b c.png", "is 9x40"),
    ]
    assert cache.kept == [i for i, sample in enumerate(samples) if name_of(sample) in ("a.png", "d.png")]
    check(cache, samples, tiny)
    Path(data.path, "a.png").unlink()
    Path(data.path, "d.png").unlink()
    with pytest.raises(ValueError, match=r"none of 4 samples can be used: .*a.jpg cannot be read"):
        make(skip, tiny, samples)


def test_a_picture_that_changes_meanwhile_is_not_believed(
    data: Data, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, _ = read_samples(data)
    place = next(i for i, sample in enumerate(samples) if name_of(sample) == "d.png")

    def changing(times: int) -> list[Sample]:
        """d.png is another picture after so many reads."""
        reads = Counter[str]()

        def read() -> bytes:
            reads["d.png"] += 1
            return Path(data.path, "d.png" if reads["d.png"] <= times else "a.png").read_bytes()

        return [replace(sample, read=read) if i == place else sample for i, sample in enumerate(samples)]

    check(make(data, tiny, changing(1)), samples, tiny)  # read once, so it cannot change meanwhile
    monkeypatch.setattr("infer.program.remembered.RECENT", -1.0)
    check(make(data, tiny, samples), samples, tiny)
    larger = replace(data, resolution=48)  # known without being read, and read to be encoded
    with pytest.raises(ValueError, match=r"d.png changed while it was being read; start again"):
        make(larger, tiny, changing(0))
    skipped = make(replace(larger, on_error="skip"), tiny, changing(0)).skipped
    assert [(Path(one.name).name, one.reason) for one in skipped] == [
        ("d.png", "changed while it was being read; start again")
    ]
    check(make(larger, tiny, samples), samples, tiny)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def test_a_damaged_shard_is_encoded_again(data: Data, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    samples, _ = read_samples(data)
    make(data, tiny, samples)
    for kind, expected in (("pictures", (4, 0)), ("texts", (0, 4)), ("index", (0, 0))):
        (file,) = list_shards(Path(data.cache, kind))
        damage(file)
        capsys.readouterr()
        cache = make(data, tiny, samples)
        assert misses(cache) == expected
        err = capsys.readouterr().err
        assert err.count(file.name) == 1 and "is damaged (the checksum of" in err
        assert misses(make(data, tiny, samples)) == (0, 0) and file.name not in capsys.readouterr().err
        check(cache, samples, tiny)

    (file,) = list_shards(Path(data.cache, "pictures"))
    damage(file)
    cache = make(data, tiny, samples, encode=replace(FAST, verify=False))  # found only when it is met
    assert misses(cache) == (0, 0)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*start again"):
        for i in range(4):
            cache.picture(i, cache.views(i)[0][0])
    assert misses(make(data, tiny, samples)) == (4, 0)


def test_prune_keeps_what_is_used(data: Data, tiny: Model) -> None:
    make(replace(data, resolution=48), tiny, more=["no longer asked"])
    samples, _ = read_samples(data)
    used = [sample for sample in samples if name_of(sample) != "d.png"]
    training, cache = make(data, tiny, samples), make(data, tiny, used)
    before = files(data)
    with pytest.raises(ValueError, match=r"cache is in use by another process"):
        prune_cache(cache, (), False, pytest.fail)
    assert files(data) == before
    training.close()
    said: list[str] = []
    prune_cache(cache, (), False, said.append)
    assert said == [f"removed from {data.cache}: 3 views of pictures, 2 texts"]
    for kind, count in (("pictures", 3), ("texts", 3), ("index", 1)):
        held = [key for file in list_shards(Path(data.cache, kind)) for key in read_keys(file)]
        assert len(held) == len(set(held)) == count
    again = make(data, tiny, used)
    assert misses(again) == (0, 0)
    check(again, used, tiny)
    folder = Path(data.cache, "index")
    known = known_identities(folder, warnings.warn)
    forgotten = [name_of(s) for s in samples if known(digest(s.read(), "picture", data.background)) is None]
    assert forgotten == ["d.png"] and len(list_shards(folder)) == 1
    assert misses(make(data, tiny, samples)) == (1, 1) and len(list_shards(folder)) == 2


def test_prune_asks_where_other_runs_have_used_what_would_go(data: Data, tiny: Model, tmp_path: Path) -> None:
    other, gone, drawn = tmp_path / "runs/other", tmp_path / "runs/gone", Path(data.cache, "prior", "drawn")
    for folder in (other, gone, drawn):
        folder.mkdir(parents=True)
    cache = make(replace(data, resolution=48), tiny, more=["a preview"])
    record_use(cache, other, [drawn])
    record_use(cache, gone, [drawn])
    cache.close()
    gone.rmdir()
    own = make(data, tiny)
    record_use(own, tmp_path / "runs", [])
    before = files(data)
    goes = f"2 views of pictures, 1 texts, {drawn}"
    with pytest.raises(ValueError) as refused:
        prune_cache(own, (), False, pytest.fail)
    assert str(refused.value) == (
        f"prune=true would remove {goes} from {data.cache}, which other runs have used: {other} (4 of them); they "
        "would encode it again. Add force=true to remove it all the same"
    )
    assert files(data) == before
    said: list[str] = []
    prune_cache(own, (), True, said.append)
    assert said == [f"removed from {data.cache}: {goes}"] and not drawn.exists()
    assert len(list(Path(data.cache, "users").iterdir())) == 2  # of those that are there
    assert misses(make(data, tiny)) == (0, 0)


def test_a_record_that_is_torn_says_nothing(data: Data, tiny: Model, tmp_path: Path) -> None:
    record_use(make(data, tiny), tmp_path, [])
    (file,) = Path(data.cache, "users").iterdir()
    file.write_text(file.read_text()[:30])
    assert list(uses(Path(data.cache))) == []
    forget_gone(Path(data.cache))
    assert not file.exists()


def test_prune_keeps_the_tables_and_class_pictures_in_use(data: Data, tiny: Model, tmp_path: Path) -> None:
    def table(name: str) -> str:
        rows = {"image": [Path(data.path, "d.png").read_bytes()], "text": [name]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
        return str(tmp_path / f"{name}.parquet")

    used = replace(data, path="", sources=[Source(table("used")), Source(data.path)], prior=Prior("", "a star", 2))
    unused = replace(used, sources=[Source(table("other"))], prior=Prior("", "a heart", 2))
    for one in (used, unused):
        read_samples(one)
        prior_folder(one, tiny, BF16).mkdir(parents=True)
        (prior_folder(one, tiny, BF16) / "00000.png").write_bytes(b"drawn")
    keep = folders_used(used, tiny, BF16)
    kinds = [[folder for folder in Path(data.cache, kind).iterdir() if folder.is_dir()] for kind in ("tables", "prior")]
    assert [len(folders) for folders in kinds] == [2, 2] and len(keep & {f for folders in kinds for f in folders}) == 2
    prune_cache(make(used, tiny), keep, False, print)
    assert {f for kind in ("tables", "prior") for f in Path(data.cache, kind).glob("*/")} == keep
    assert (prior_folder(used, tiny, BF16) / "00000.png").read_bytes() == b"drawn"
    assert misses(make(used, tiny)) == (0, 0)


class Ranks:
    """Ranks as threads, with a gather that waits for all; between gathers one at a time, as torch loads models."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.turn = count, threading.Barrier(count, timeout=60), threading.Lock()
        self.slots: list[list[Any]] = [[] for _ in range(count)]

    def gather(self, rank: int) -> Callable[[list[Any]], list[Any]]:
        def own(items: list[Any]) -> list[Any]:
            self.slots[rank] = items
            self.turn.release()
            self.barrier.wait()
            everything = [item for slot in self.slots for item in slot]
            self.barrier.wait()
            self.turn.acquire()
            return everything

        return own

    def build(self, data: Data, model: Model, samples: list[Sample]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def work(rank: int) -> None:
            with self.turn:
                try:
                    results[rank] = make(data, model, samples, rank=rank, ranks=self.count, gather=self.gather(rank))
                except ValueError as error:
                    results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_share_the_work(data: Data, tiny: Model) -> None:
    samples, _ = read_samples(data)
    caches = Ranks(2).build(data, tiny, samples)
    written = [len(read_keys(file)) for file in list_shards(Path(data.cache, "pictures"))]
    assert written == [2, 2]  # each its own half, none twice
    for cache in caches:
        assert cache.counts == caches[0].counts and misses(cache) == (4, 4)
        check(cache, samples, tiny)
    damage(list_shards(Path(data.cache, "pictures"))[1])  # whoever finds it, it counts as absent for both
    for cache in Ranks(2).build(data, tiny, samples):
        assert misses(cache) == (2, 0)
        check(cache, samples, tiny)
    Path(data.path, "d.png").write_bytes(b"")
    errors = Ranks(2).build(data, tiny, samples)
    assert all("d.png cannot be read" in str(error) for error in errors)  # no rank waits for one that stopped


TOGETHER = """
import os, signal, sys, time
from pathlib import Path
from train.latents.users import forget_gone, record_use, uses
from train.latents.writer import ShardWriter
from tests.train.latents.test_cache import *
pictures, cache, model, own, other, most = sys.argv[1:]
add, count = ShardWriter.add, [0]
def add_slowly(self, key, item):
    add(self, key, item)
    count[0] += 1
    time.sleep(0.1)
    if count[0] == int(most):
        self._wait()
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.add = add_slowly
Path(own).touch()
begun = time.monotonic()
while not Path(other).exists():
    time.sleep(0.01)
    assert time.monotonic() - begun < 200
make(Data(pictures, resolution=32, cache=cache, flip=True), Model(model), encode=Encode(workers=1, flush_seconds=0))
print(count[0])
"""


def test_processes_share_the_work_and_a_killed_one_is_continued(data: Data, tiny: Model, tmp_path: Path) -> None:
    data = replace(data, flip=True)
    marks = [str(tmp_path / "first"), str(tmp_path / "second")]
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    given = [str(script), data.path, data.cache, tiny.path]
    first, second = (
        Forked([*given, *ways, most], ROOT, os.environ, tmp_path / f"{most}.log")
        for ways, most in ((marks, "3"), (marks[::-1], "99"))
    )
    code, said = second.finish(400)
    assert code == 0, said
    assert first.finish(60)[0] == -signal.SIGKILL
    written = [
        key for kind in ("pictures", "texts") for f in list_shards(Path(data.cache, kind)) for key in read_keys(f)
    ]
    assert len(written) == len(set(written)) == 8 + 4  # nothing twice, nothing lost: three by the one that was killed
    assert int(said.splitlines()[-1]) == 9

    command = [str(ROOT / "train/cache.py"), f"data.path='{data.path}'", f"data.cache='{data.cache}'"]
    options = ["data.resolution=32", "data.flip=true", "precision=bf16", "device=cpu", "prune=true", "json=true"]
    code, said = Forked([*command, *options], tmp_path, os.environ, tmp_path / "pruned.log").finish(400)
    assert code == 0, said
    size = sum(file.stat().st_size for file in Path(data.cache).rglob("*") if file.is_file())
    assert json.loads(said.splitlines()[-1]) == {
        "samples": 4,
        "image_hits": 8,
        "image_misses": 0,
        "text_hits": 3,
        "text_misses": 0,
        "bytes": size,
        "skipped": 0,
    }
    samples, _ = read_samples(data)
    cache = make(data, tiny, samples)
    assert misses(cache) == (0, 1)  # the prompt was not asked for, and pruned
    check(cache, samples, tiny)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_pixels": 0}, "encode.batch_pixels is 0; it must be 1 or more, or null"),
        ({"tile": 100}, "encode.tile is 100; give a multiple of 32"),
        ({"tile": -32}, "encode.tile is -32"),
        ({"workers": 0}, "encode.workers is 0; it must be 1"),
        ({"decode_pixels": 0}, "encode.decode_pixels is 0"),
        ({"shard_mib": 0}, "encode.shard_mib is 0"),
        ({"flush_seconds": float("nan")}, "encode.flush_seconds is nan; it must be 0 or more"),
    ],
)
def test_encode_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encode(**options)
