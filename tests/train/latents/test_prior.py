"""Class pictures that the base draws: what a pipeline draws for the prompt, once, whoever asks."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm

from infer.checkpoint.model import Model
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision
from infer.sample.generate import noise
from infer.sample.picture import decode
from tests.train.latents.test_writer import Other
from train.data.dataset import Data, Prior
from train.latents import prior as prior_module
from train.latents.prior import prior_folder, prior_samples, shared

CPU = torch.device("cpu")
BF16 = Precision("bf16")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    prior = Prior(prompt="a large red star ", count=3, steps=2, guidance=2.0, seed=7)
    return Data("unused", 64, cache=str(tmp_path / "cache"), prior=prior)


def test_class_pictures_are_what_the_pipeline_draws(data: Data, tiny: Model) -> None:
    samples = prior_samples(data, tiny, BF16, CPU)
    assert [sample.captions for sample in samples] == [("a large red star",)] * 3
    assert {sample.source for sample in samples} == {1}  # after data.path
    pipeline: Any = FluxPipeline.from_pretrained(tiny.path, torch_dtype=torch.bfloat16)
    pipeline.to(compute_dtype(torch.bfloat16, CPU))
    pipeline.set_progress_bar_config(disable=True)
    for i in range(3):
        drawn = pipeline(
            data.prior.prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=2.0,
            latents=noise(7 + i, 64, 64, 16).to(pipeline.transformer.dtype),
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
        ).images[0]
        apart = [np.abs(np.asarray(decode(s.read(), s.name)).astype(int) - np.asarray(drawn)) for s in samples]
        assert apart[i].mean() < 1 and apart[i].max() < 10  # the pipeline decodes from bf16
        assert all(other.mean() > 10 for other in apart[:i] + apart[i + 1 :])


def test_they_are_drawn_once_and_shared_by_ranks(data: Data, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prior_samples(data, tiny, BF16, CPU, 1, 2)  # of three, the second rank draws the one in the middle
    there = [Path(sample.name).is_file() for sample in first]
    assert there == [False, True, False]
    kept = first[1].read()
    samples = prior_samples(data, tiny, BF16, CPU, 0, 2)
    assert all(Path(sample.name).is_file() for sample in samples) and samples[1].read() == kept
    monkeypatch.setattr(prior_module, "load_transformer", None)
    assert [sample.name for sample in prior_samples(data, tiny, BF16, CPU)] == [sample.name for sample in samples]
    fewer = replace(data, prior=replace(data.prior, count=2))
    assert len(prior_samples(fewer, tiny, BF16, CPU)) == 2
    more = replace(data, prior=replace(data.prior, count=4))
    with pytest.raises(TypeError):  # one has to be drawn
        prior_samples(more, tiny, BF16, CPU)
    assert prior_samples(replace(data, prior=Prior()), tiny, BF16, CPU) == []
    assert Image.open(io.BytesIO(kept)).size == (64, 64)


@pytest.mark.parametrize("finished", [True, False])
def test_two_processes_draw_none_twice(tmp_path: Path, finished: bool) -> None:
    files, other = [tmp_path / f"{i:05d}.png" for i in range(3)], Other(tmp_path)
    assert other.ask("claim", f"{1:015x}") == "True"
    drawn = []
    for i in shared([0, 1, 2], files, tqdm(disable=True)):
        drawn.append(i)
        assert i == 1 or other.ask("claim", f"{i:015x}") == "False"
        files[i].touch()
        if i == 2:  # the other one has gone on meanwhile, or ended without it
            if finished:
                files[1].touch()
            other.kill()
    assert drawn == ([0, 2] if finished else [0, 2, 1])
    assert list(shared([0, 1, 2], files, tqdm(disable=True))) == []


def test_what_another_picture_depends_on(data: Data, tiny: Model) -> None:
    folders = {prior_folder(data, tiny, BF16)}
    for change in ({"prompt": "a dog"}, {"steps": 3}, {"guidance": 1.0}, {"seed": 8}):
        folders.add(prior_folder(replace(data, prior=replace(data.prior, **change)), tiny, BF16))  # type: ignore[arg-type]
    folders.add(prior_folder(replace(data, resolution=[32, 64]), tiny, BF16))
    folders.add(prior_folder(replace(data, text_length=9), tiny, BF16))
    folders.add(prior_folder(data, tiny, Precision("nf4")))
    assert len(folders) == 8
    same = replace(data, batch_size=3, trigger="sks", prior=replace(data.prior, count=9, weight=0.5, ratio=2.0))
    assert prior_folder(same, tiny, BF16) in folders
