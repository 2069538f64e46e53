"""The objective on held-out pictures, at fixed noise."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from train.latents.store import Cache
from train.loop.batch import Samples, validation_batch, validation_parts
from train.loop.micro_step import batch_losses
from train.ranks.launch import shards
from train.run.config import Train


def validate(job: Train, accelerator: Accelerator, transformer: Any, cache: Cache, samples: Samples) -> float | None:
    """The mean objective over the held-out pictures, by their masks but by no weights; None if none is held out.

    Raises:
        ValueError: it is not finite.
    """
    if not samples.validation:
        return None
    place = accelerator.process_index, accelerator.num_processes
    transformer.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    of_ranks = [validation_parts(job, cache, samples, rank, place[1]) for rank in range(place[1])]
    own = of_ranks[place[0]]
    with torch.no_grad():
        # where weights are shared, all ranks take part in each forward pass: who is done repeats one, uncounted
        for turn in range(max(map(len, of_ranks)) if shards() else len(own)):
            counts = turn < len(own)
            batch = validation_batch(job, cache, samples, own[turn] if counts else of_ranks[0][0], accelerator.device)
            values = batch_losses(transformer, batch, job, "none")
            if counts:
                total += total.new_tensor([values.double().sum().item(), len(values)])
    transformer.train()
    summed: Any = accelerator.reduce(total, "sum")
    value = float(summed[0] / summed[1])
    if not math.isfinite(value):
        raise ValueError(
            f"the validation loss is {value}: the adapter's weights are ruined; lower optim.lr or raise optim.warmup "
            "and start over, or go on from an older checkpoint with resume=step-..."
        )
    return value
