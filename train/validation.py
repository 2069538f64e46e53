"""The objective on held-out pictures, at fixed noise."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from train.batch import Samples, validation_batches
from train.cache import Cache
from train.config import Train
from train.step import batch_losses


def validate(job: Train, accelerator: Accelerator, transformer: Any, cache: Cache, samples: Samples) -> float | None:
    """The mean objective over the held-out pictures, by their masks but by no weights; None if none is held out.

    Raises:
        ValueError: it is not finite.
    """
    if not samples.validation:
        return None
    transformer.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    share = accelerator.process_index, accelerator.num_processes
    with torch.no_grad():
        for batch in validation_batches(job, cache, samples, *share, accelerator.device):
            values = batch_losses(transformer, batch, job, "none")
            total += torch.tensor([values.double().sum().item(), len(values)], dtype=torch.float64, device=total.device)
    transformer.train()
    summed: Any = accelerator.reduce(total, "sum")
    value = float(summed[0] / summed[1])
    if not math.isfinite(value):
        raise ValueError(
            f"the validation loss is {value}: the adapter's weights are ruined; lower optim.lr or raise optim.warmup "
            "and start over, or go on from an older checkpoint with resume=step-..."
        )
    return value
