"""Velocities and losses of a transformer at any precision, for the same pictures, noise and noise levels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infer.adapter.selection import Trained, load_chosen
from infer.checkpoint.load import load_transformer
from infer.device.device import release
from infer.fast.install import choose_path, hold_of
from infer.fast.weights import obstacle
from infer.sample.generate import mend_of
from train.data.caption import all_texts
from train.data.samples import check_left, read_samples
from train.latents.build import build
from train.latents.store import Cache
from train.loop.batch import Samples, split_samples, validation_batch, validation_items
from train.loop.micro_step import batch_velocity
from train.objective.flow_matching import Flow, losses
from train.run.config import Train

Say = Callable[[str], object]


@dataclass
class Probe:
    """One picture at one noise level."""

    picture: str  # its name
    level: int
    sigma: float
    velocity: Tensor  # [tokens, channels * 4], fp32, on the CPU
    loss: float  # the flow-matching objective, unweighted


def prepare(job: Train, device: torch.device, most: int | None) -> tuple[Cache, Samples]:
    """Encodings at a job's precision, and the pictures that are held out; where none are, all pictures.

    most: of these pictures at most so many are taken, evenly spread; None takes all.
    """
    samples, skipped = read_samples(job.data)
    check_left(job.data, samples, skipped)
    texts = list(dict.fromkeys(all_texts(samples, job.data)))
    cache = build(job.data, samples, texts, job.model, job.precision, job.encode, device)
    samples = [samples[i] for i in cache.kept]
    check_left(job.data, samples, skipped + cache.skipped)
    chosen = split_samples(samples, cache, job.data, job.seed)
    held = chosen.validation or chosen.train
    if most is not None and most < len(held):
        held = [held[i * len(held) // most] for i in range(most)]
    return cache, replace(chosen, validation=held)


@contextmanager
def loaded(job: Train, device: torch.device, say: Say) -> Iterator[Any]:
    """The transformer at a job's precision, on its path, for the time of a with-block; sets `job.memory` to the path
    that is taken. Adapters that come later must be able to run on it (infer/adapter/checks.py, `check_running`)."""
    transformer = load_transformer(job.model, job.precision, device, hold_of(job.memory))
    job.memory, _ = choose_path(transformer, job.memory, job.precision, device, say)  # a stream streams all blocks
    try:
        yield transformer
    finally:
        del transformer
        release(device)


def switch_on(transformer: Any, job: Train, chosen: Trained) -> list[str]:
    """Load adapters; returns what they are called in the model."""
    names = load_chosen(transformer, chosen, job.model)
    assert not job.memory.fused or obstacle(transformer) is None, obstacle(transformer)
    return names


def probe(
    transformer: Any, job: Train, cache: Cache, samples: Samples, device: torch.device, tick: Callable[[int], object]
) -> list[Probe]:
    """Every held-out picture at every level; tick: told how many are done.

    Raises:
        ValueError: a velocity or loss is not finite.
    """
    found = []
    with torch.no_grad():
        for part in validation_items(job, cache, samples, 0, 1):
            batch = validation_batch(job, cache, samples, part, device)
            velocities = batch_velocity(transformer, batch, job)
            values = losses(velocities, batch.x0, batch.noise, batch.sigma, Flow(), batch.mask)
            figures = zip(part, velocities.cpu(), batch.sigma, values, strict=True)
            for (index, level, _), velocity, sigma, loss in figures:
                one = Probe(samples.all[index].name, level, float(sigma), velocity, float(loss))
                if not (velocity.isfinite().all() and loss.isfinite()):
                    raise ValueError(
                        f"at precision {job.precision.kind} the transformer's output for {one.picture} at noise "
                        f"{one.sigma:.3f} is not finite; {mend_of(transformer)}"
                    )
                found.append(one)
            tick(len(part))
    return found
