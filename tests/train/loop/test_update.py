"""Whole updates against diffusers' recipe for FLUX, written down independently: plain layers, PEFT, torch's AdamW.

Source: diffusers examples/dreambooth/train_dreambooth_lora_flux.py, its loop.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.quantize.precision import Precision
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.loop.batch import Batch
from train.objective.optim import Optim
from train.run.config import Train
from train.train import train

RUN, STEP = (importlib.import_module(f"train.loop.{name}") for name in ("run", "step"))
RANK, ALPHA, STEPS, ACCUMULATION = 4, 6.0, 3, 2


def trained(transformer: Any) -> dict[str, Tensor]:
    """The adapter's matrices by layer, whatever PEFT calls the adapter."""
    return {
        re.sub(r"(lora_[AB])\.\w+\.weight", r"\1", name): parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }


def loss_of(transformer: Any, batch: Batch, guidance: float) -> Tensor:
    assert batch.pooled is not None
    count, channels, height, width = batch.x0.shape
    sigmas = batch.sigma.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.x0 + sigmas * batch.noise
    prediction = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=batch.sigma,
        guidance=torch.full([count], guidance) if transformer.config.guidance_embeds else None,
        pooled_projections=batch.pooled.float(),
        encoder_hidden_states=batch.embeds.float(),  # stored in bf16
        txt_ids=torch.zeros(batch.embeds.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    prediction = FluxPipeline._unpack_latents(prediction, height * 8, width * 8, 8)
    target = batch.noise - batch.x0
    return ((prediction.float() - target.float()) ** 2).reshape(count, -1).mean(1).mean()


def test_updates_are_those_of_diffusers_recipe(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, on our fast path: three updates of two batches each move the adapter to the same place."""
    monkeypatch.chdir(tmp_path)
    make_style(tmp_path / "pictures", 6, seed=1)
    job = Train(
        model=tiny, precision=Precision("fp32"), adapter=Adapter(RANK, ALPHA),
        data=Data("pictures", 64, 2, validation=0, cache="cache"), optim=Optim(lr=1e-3, weight_decay=0.1, clip=0.2),
        run="ours", steps=STEPS, accumulation=ACCUMULATION, validate_every=0, save_every=0, previews=[], device="cpu",
    )  # fmt: skip
    batches: list[Batch] = []
    models: list[Any] = []
    start: dict[str, Tensor] = {}
    fit, training_batch = RUN.fit, STEP.training_batch

    def fitted(session: Any) -> Any:
        models.append(session.model.transformer)
        start.update({name: parameter.detach().clone() for name, parameter in trained(models[0]).items()})
        return fit(session)

    def recorded(*args: Any) -> Batch:
        batches.append(training_batch(*args))
        return batches[-1]

    monkeypatch.setattr(RUN, "fit", fitted)
    monkeypatch.setattr(STEP, "training_batch", recorded)
    train(job)
    assert len(batches) == STEPS * ACCUMULATION and {len(batch.x0) for batch in batches} == {2}

    transformer: Any = FluxTransformer2DModel.from_pretrained(tiny.path, subfolder="transformer").requires_grad_(False)
    layers = sorted({name.rpartition(".lora_")[0] for name in start})
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    parameters = trained(transformer)
    assert parameters.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(STEPS):
        for batch in batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            (loss_of(transformer, batch, job.flow.guidance) / ACCUMULATION).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.2)
        assert norm > 0.2  # so that clipping shows
        optimizer.step()
        optimizer.zero_grad()
    ours = {name: parameter.detach() for name, parameter in trained(models[0]).items()}
    moved = sum(float((parameter.detach() - start[name]).square().sum()) for name, parameter in parameters.items())
    apart = sum(float((parameter.detach() - ours[name]).square().sum()) for name, parameter in parameters.items())
    assert moved > 0 and apart < 1e-6 * moved  # Adam divides by small second moments: rounding grows by it
