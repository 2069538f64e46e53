"""Training on everything at once, on two ranks: each latent, mask and text that was trained, against its picture."""

import json
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageOps

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.program.paths import ROOT
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision
from tests.forked import ranks
from train.data.dataset import Data, Prior
from train.data.source import Source
from train.run.config import Train

RECORD = """
import importlib, os, pickle, sys
import torch

sys.path[0] = {root!r}
from train.train import train

step, seen = importlib.import_module("train.loop.step"), []
original = step.training_batch

def recorded(job, cache, samples, places, weight, device):
    batch = original(job, cache, samples, places, weight, device)
    seen.append((len(places), [place.epoch for place in places], batch.__dict__))
    return batch

step.training_batch = recorded
job = pickle.loads(open({job!r}, "rb").read())
train(job)
torch.save(seen, {out!r} + os.environ["RANK"])
"""
SHAPES = [(64, 64), (120, 80), (80, 120), (200, 64), (70, 70)]
SIDES = [64, 48]


@dataclass
class Written:
    """A picture as it was made."""

    picture: Image.Image
    texts: set[str]
    mask: Image.Image | None
    weight: float
    times: float


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def make(folder: Path) -> dict[str, Written]:
    """Three folders: with metadata, masks and two captions each; with sidecars; of the class at large."""
    made: dict[str, Written] = {}
    lines = []
    for i, size in enumerate(SHAPES):
        picture, name = smooth(i, size), f"one/{i}.png"
        mask = Image.fromarray(np.random.default_rng(100 + i).integers(0, 255, size[::-1], np.uint8))
        for file, image in ((name, picture), (f"masks/{i}.png", mask)):
            (folder / file).parent.mkdir(exist_ok=True)
            image.save(folder / file)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [f"number {i}", f"{i} again, sks"]}))
        made[name] = Written(picture, {f"sks, number {i}", f"{i} again, sks", ""}, mask, 1.0, 2)
    (folder / "one/metadata.jsonl").write_text("\n".join(lines))
    for i, size in enumerate(SHAPES[:4]):
        picture, name = smooth(10 + i, size), f"two/{i}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        picture.save(folder / name)
        (folder / f"two/{i}.txt").write_text(f"tag {i}")
        made[name] = Written(picture, {f"sks, tag {i}", ""}, None, 0.5, 1)
    for i, size in enumerate(SHAPES[:3]):
        picture, name = smooth(20 + i, size), f"class/{i}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        picture.save(folder / name)
        made[name] = Written(picture, {"a thing", ""}, None, 0.25, 7 / 3)  # half as often as the other 14 together
    return made


def bucket(width: int, height: int, side: int) -> tuple[int, int]:
    """By trying all: the size that cuts least of those that cannot grow."""

    def allowed(w: int, h: int) -> bool:
        return w <= width and h <= height and w * h <= side**2 and max(w, h) <= 2 * min(w, h)

    steps = range(16, 200, 16)
    whole = [
        (w, h) for w in steps for h in steps if allowed(w, h) and not allowed(w + 16, h) and not allowed(w, h + 16)
    ]
    return max(whole, key=lambda size: min(size[0] * height, size[1] * width) / max(size[0] * height, size[1] * width))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have it (tests/forked.py): several threads add up in another order, and deviations are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Model) -> tuple[dict[str, Written], list[list[Any]]]:
    """What was made, and of each rank the batches that it trained."""
    folder = tmp_path_factory.mktemp("mixed")
    made = make(folder)
    data = Data(
        resolution=SIDES,
        batch_size=2,
        trigger="sks",
        validation=0,
        sources=[
            Source(str(folder / "one"), masks=str(folder / "masks"), repeats=2),
            Source(str(folder / "two"), weight=0.5),
        ],
        prior=Prior(str(folder / "class"), "a thing", ratio=0.5, weight=0.25),
        flip=True,
        caption_dropout=0.2,
        cache=str(folder / "cache"),
    )
    job = Train(
        model=tiny, precision=Precision("bf16"), adapter=Adapter(rank=2), data=data, steps=14, save_every=0,
        device="cpu", run="mixed", previews=[],
    )  # fmt: skip
    (folder / "job").write_bytes(pickle.dumps(job))
    script = folder / "record.py"
    script.write_text(RECORD.format(root=str(ROOT), job=str(folder / "job"), out=str(folder / "seen")))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    for rank in ranks(2, [str(script)], folder, environment, folder / "log"):
        code, said = rank.finish(300)
        assert code == 0, said
    return made, [torch.load(folder / f"seen{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def references(run: tuple[dict[str, Written], Any], tiny: Model) -> list[tuple[str, bool, Any, Any, Any]]:
    """Every picture in each of its sizes, plain and mirrored: its posterior and its mask, by Pillow and diffusers."""
    vae: Any = AutoencoderKL.from_pretrained(tiny.path, subfolder="vae", torch_dtype=torch.bfloat16)
    # rounds as the trainer's does
    vae.to(compute_dtype(torch.bfloat16, torch.device("cpu")), memory_format=torch.channels_last)
    found = []
    for name, one in run[0].items():
        for size in dict.fromkeys(bucket(*one.picture.size, side) for side in SIDES):
            for mirrored in (False, True):
                pixels = ImageOps.fit(one.picture, size, Image.Resampling.LANCZOS)
                tensor = torch.tensor(np.asarray(ImageOps.mirror(pixels) if mirrored else pixels)).permute(2, 0, 1)
                with torch.no_grad():
                    posterior = vae.encode((tensor[None] / 255 * 2 - 1).to(vae.dtype)).latent_dist
                factor, shift = vae.config.scaling_factor, vae.config.shift_factor
                mean, deviation = (part[0].bfloat16().float() for part in (posterior.mean, posterior.std))
                mean, deviation = (mean - shift) * factor, deviation * factor
                mask = None
                if one.mask is not None:
                    small = ImageOps.fit(one.mask, (size[0] // 8, size[1] // 8), Image.Resampling.BOX)
                    mask = torch.tensor(np.asarray(ImageOps.mirror(small) if mirrored else small) / 255)
                found.append((name, mirrored, mean, deviation, mask))
    return found


def test_each_trained_latent_has_the_mask_the_text_and_the_weight_of_its_picture(
    run: tuple[dict[str, Written], list[list[Any]]], references: list[tuple[str, bool, Any, Any, Any]], tiny: Model
) -> None:
    made, ranks = run
    texts = sorted(set().union(*(one.texts for one in made.values())))
    pipeline = FluxPipeline.from_pretrained(tiny.path, transformer=None, vae=None, torch_dtype=torch.bfloat16)
    pipeline.to(compute_dtype(torch.bfloat16, torch.device("cpu")))  # as the trainer encodes
    with torch.no_grad():
        length = pipeline.tokenizer_2.model_max_length
        pairs = {text: pipeline.encode_prompt(text, None, max_sequence_length=length)[:2] for text in texts}
    encoded = {text: [part[0].bfloat16() for part in parts] for text, parts in pairs.items()}
    seen: dict[int, Counter[str]] = defaultdict(Counter)
    used: set[tuple[str, bool, Any]] = set()
    said: set[str] = set()
    assert len(ranks[0]) == len(ranks[1]) == 14
    for batches in zip(*ranks, strict=True):
        assert len({tuple(batch["x0"].shape[1:]) for _, _, batch in batches}) == 1  # one size on all ranks
        real = sum(int((batch["weight"] > 0).sum()) for _, _, batch in batches)
        for count, epochs, batch in batches:
            for i in range(count):
                x0, weight = batch["x0"][i], float(batch["weight"][i])
                alike = [one for one in references if one[2].shape == x0.shape]
                # x0 is drawn from the posterior: mean 0 and variance 1 once that is taken off
                scores = [float(((x0 - mean) / deviation).square().mean()) for _, _, mean, deviation, _ in alike]
                best = min(range(len(scores)), key=scores.__getitem__)
                others = [score for j, score in enumerate(scores) if j != best]
                assert 0.7 < scores[best] < 1.4 and min(others, default=99) > 5
                name, mirrored, mean, _, mask = alike[best]
                own = batch["embeds"][i], batch["pooled"][i]
                (text,) = [text for text, parts in encoded.items() if all(map(torch.equal, own, parts))]
                assert text in made[name].texts
                if mask is not None:
                    torch.testing.assert_close(batch["mask"][i, 0].double(), mask, atol=1 / 255, rtol=0)
                elif batch["mask"] is not None:
                    assert batch["mask"][i].eq(1).all()
                if weight > 0:  # else a copy for a rank for which nothing was left
                    assert weight == pytest.approx(made[name].weight * 2 / real)
                    seen[epochs[i]][name] += 1
                    used.add((name, mirrored, mean.shape))
                    said.add(text)
    # the first epoch is whole: each as often as it should be
    assert len(seen) >= 2
    for name, one in made.items():
        assert int(one.times) <= seen[0][name] <= int(one.times) + (one.times % 1 > 0)
    assert sum(seen[0].values()) == 21
    assert said >= {"", "a thing"} and len(said) > 8
    assert len({mirrored for _, mirrored, _ in used}) == 2
    assert len({shape for _, _, shape in used}) >= 4  # several sizes of several resolutions
    assert any(float(batch["weight"].max()) == 0 for batches in ranks for _, _, batch in batches)  # a short batch
