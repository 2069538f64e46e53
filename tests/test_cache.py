"""Cached samples against diffusers' own autoencoder and pipeline; keys against every way to take one for another."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from infer.flux import Model
from infer.quantize import Precision
from train import cache as cache_module
from train.cache import Cache, build
from train.data import Data, Sample, read_samples

CPU = torch.device("cpu")
BF16 = Precision("bf16")
CAPTIONS = {"a.png": "a red star", "a.jpg": "a red star", "b c.png": "two blue hearts", "d.png": "a very green circle"}


def picture(seed: int) -> Image.Image:
    """Smooth, so that no two are alike to the autoencoder."""
    small = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((40, 36), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        picture(i).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    return Data(str(folder), resolution=32, cache=str(tmp_path / "cache"))


def make(data: Data, model: Model, samples: list[Sample] | None = None, **options: Any) -> Cache:
    rest: dict[str, Any] = {"extra_texts": ["a prompt"], "precision": BF16, "write": True} | options
    return build(data, read_samples(data) if samples is None else samples, model=model, device=CPU, **rest)


def files(data: Data) -> dict[str, int]:
    """Every file in the cache, with the time at which it was written."""
    root = Path(data.cache)
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def by_name(cache: Cache, samples: list[Sample]) -> dict[str, str]:
    return {Path(s.name).name: key for s, key in zip(samples, cache.pictures, strict=True)}


def test_samples_are_what_diffusers_encodes(data: Data, tiny: Model) -> None:
    samples = read_samples(data)
    make(data, tiny, samples)
    random.Random(3).shuffle(samples)
    cache = make(data, tiny, samples)

    vae: Any = AutoencoderKL.from_pretrained(tiny.path, subfolder="vae", torch_dtype=torch.bfloat16)
    means = []
    for i, sample in enumerate(samples):
        square = Image.open(sample.name).resize((32, 32), Image.Resampling.LANCZOS, box=(2, 0, 38, 36))
        pixels = torch.tensor(np.asarray(square)).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels.bfloat16()).latent_dist
        mean, deviation = cache.picture(i)
        assert mean.dtype == deviation.dtype == torch.float32
        factor, shift = vae.config.scaling_factor, vae.config.shift_factor
        torch.testing.assert_close(mean / factor + shift, posterior.mean[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(deviation / factor, posterior.std[0].float(), rtol=1e-5, atol=1e-5)
        means.append(mean)
    apart = [(a - b).abs().max() for i, a in enumerate(means) for b in means[:i]]
    assert min(apart) > 0.2  # so the tolerance above tells them from each other

    pipeline = FluxPipeline.from_pretrained(tiny.path, transformer=None, vae=None, torch_dtype=torch.bfloat16)
    length = pipeline.tokenizer_2.model_max_length
    found = {Path(sample.name).name: cache.text(sample.caption) for sample in samples}
    for name, caption in {**CAPTIONS, "": "a prompt"}.items():
        text = found[name] if name else cache.text(caption)
        with torch.no_grad():
            t5, pooled, _ = pipeline.encode_prompt(caption, None, max_sequence_length=length)
        assert torch.equal(text.t5, t5[0]) and torch.equal(text.pooled, pooled[0])
    assert (found["a.png"].t5 - found["d.png"].t5).abs().max() > 0.1


def test_second_build_encodes_nothing(data: Data, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(data, tiny)
    before = files(data)
    assert len(before) == 4 + 4  # pictures, and three captions with a prompt: two share one

    def never(*args: object, **options: object) -> None:
        raise AssertionError("something is encoded")

    monkeypatch.setattr(cache_module, "load_vae", never)
    monkeypatch.setattr(cache_module, "text_encoder", never)
    second = make(data, tiny)
    assert (second.pictures, second.texts) == (first.pictures, first.texts)
    assert files(data) == before
    with pytest.raises(AssertionError, match="something is encoded"):
        make(data, tiny, extra_texts=["another"])
    other = make(data, tiny, extra_texts=["another"], write=False)  # another rank: it works out keys alone
    assert other.pictures == first.pictures and files(data) == before


def test_renaming_costs_nothing_and_an_edit_is_seen(data: Data, tiny: Model) -> None:
    folder = Path(data.path)
    picture(0).save(folder / "d.bmp")  # a.png again, under another format: encoded once
    samples = read_samples(data)
    keys = by_name(make(data, tiny, samples), samples)
    assert keys["d.bmp"] == keys["a.png"]
    assert len(set(keys.values())) == 4  # a.png and a.jpg differ
    before = files(data)

    (folder / "a.png").rename(folder / "d e.png")
    (folder / "a.txt").rename(folder / "d e.txt")
    (folder / "a.jpg").unlink()
    samples = read_samples(data)
    assert by_name(make(data, tiny, samples), samples)["d e.png"] == keys["a.png"]
    assert files(data) == before

    bitmap = folder / "d.bmp"  # not compressed: the same bytes for any content
    status = bitmap.stat()
    picture(9).save(bitmap)
    os.utime(bitmap, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (bitmap.stat().st_size, bitmap.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    samples = read_samples(data)
    cache = make(data, tiny, samples)
    edited = by_name(cache, samples)["d.bmp"]
    assert edited not in keys.values()
    assert set(files(data)) - set(before) == {f"pictures/{edited[:2]}/{edited}.safetensors"}
    place = cache.pictures.index(edited)
    old = load_file(Path(data.cache, "pictures", keys["d.bmp"][:2], f"{keys['d.bmp']}.safetensors"))["mean"]
    assert (cache.picture(place)[0] - old).abs().max() > 0.2


def perturbed(model: Model, part: str, folder: Path) -> Model:
    """A copy of a checkpoint with one number of one tensor changed."""
    shutil.copytree(Path(model.path).resolve(), folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return Model(str(folder))


@pytest.mark.parametrize(
    "change, pictures, texts",
    [
        ("vae", True, False),
        ("text_encoder", False, True),
        ("text_encoder_2", False, True),
        ("transformer", False, False),
        ("tokenizer", False, True),
        ({"resolution": 48}, True, False),
        ({"text_length": 7}, False, True),
        (Precision("nf4"), False, True),
        (Precision("bf16", t5="int8"), False, True),
        (Precision("nf4", t5="bf16", skip_modules=["proj_out"]), False, False),
        ({"batch_size": 3, "validation": 0.5}, False, False),
    ],
)
def test_what_changes_a_key(data: Data, tiny: Model, tmp_path: Path, change: Any, pictures: bool, texts: bool) -> None:
    samples = read_samples(data)
    before = make(data, tiny, samples, write=False)
    model, precision = tiny, BF16
    if isinstance(change, Precision):
        precision = change
    elif isinstance(change, dict):
        for name, value in change.items():
            setattr(data, name, value)
    elif change == "tokenizer":
        shutil.copytree(Path(tiny.path).resolve(), tmp_path / "copy")
        file = tmp_path / "copy" / "tokenizer_2" / "tokenizer_config.json"
        file.write_text(file.read_text().replace("{", '{"note": 1,', 1))
        model = Model(str(tmp_path / "copy"))
    else:
        model = perturbed(tiny, change, tmp_path / "copy")
    after = make(data, model, samples, precision=precision, write=False)
    assert [a != b for a, b in zip(before.pictures, after.pictures, strict=True)] == [pictures] * 4
    assert {a for a in before.texts if before.texts[a] != after.texts[a]} == (set(before.texts) if texts else set())
    assert not files(data)


@pytest.mark.parametrize("dies_at", [2, 5])
def test_a_crash_leaves_whole_files(data: Data, tiny: Model, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
    calls: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if len(calls) == dies_at:
            raise OSError(28, "No space left on device")
        calls.append(source)
        Path(source).rename(target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        make(data, tiny)
    monkeypatch.undo()
    there = files(data)
    assert len(there) == dies_at and all(name.endswith(".safetensors") for name in there)
    for name in there:
        assert load_file(Path(data.cache, name))
    cache = make(data, tiny)
    assert len(files(data)) == 8 and {name: files(data)[name] for name in there} == there
    assert all(cache.picture(i)[0].isfinite().all() for i in range(4)) and cache.text("a prompt")
