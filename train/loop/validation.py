"""The objective on held-out pictures, with fixed noise."""

import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from train.latents.store import Cache
from train.loop.batch import Samples, validation_batch, validation_items
from train.loop.micro_step import batch_losses, preserved_losses
from train.objective.flow_matching import Flow
from train.ranks.launch import uses_fsdp
from train.run.config import Train


class Validation(NamedTuple):
    """The objective of the held-out pictures."""

    means: dict[str, float]
    """`validation_loss`; under output preservation the mean distance from the base's prediction as
    `validation_preservation`, too."""
    by_level: list[float]
    """The loss at each noise level, the lowest first."""


def validate(
    job: Train, accelerator: Accelerator, transformer: Any, cache: Cache, samples: Samples, step: int
) -> Validation | None:
    """The mean squared error over the held-out pictures, with masks but without weights; None if none is held out.

    step: that the adapter has reached.

    Raises:
        ValueError: it is not finite.
    """
    if not samples.validation:
        return None
    rank, ranks = accelerator.process_index, accelerator.num_processes
    transformer.eval()
    names = ["validation_loss", *(["validation_preservation"] if job.preserve.kind != "none" else [])]
    total = torch.zeros(len(names) + 1, dtype=torch.float64, device=accelerator.device)
    by_level = torch.zeros(job.validation_levels, 2, dtype=torch.float64, device=accelerator.device)
    by_rank = [validation_items(job, cache, samples, each, ranks) for each in range(ranks)]
    mine = by_rank[rank]
    with torch.no_grad():
        # under FSDP all ranks take part in each forward pass: a rank that is done repeats a batch, which does not count
        for turn in range(max(map(len, by_rank)) if uses_fsdp() else len(mine)):
            counts = turn < len(mine)
            batch = validation_batch(job, cache, samples, mine[turn] if counts else by_rank[0][0], accelerator.device)
            found = [batch_losses(transformer, batch, job, Flow())]
            if len(names) > 1:
                found.append(preserved_losses(transformer, batch, job, Flow()))
            if counts:
                total += total.new_tensor([*(values.double().sum().item() for values in found), len(found[0])])
                levels = torch.tensor([level for _, level, _ in mine[turn]], device=accelerator.device)
                losses = found[0].double()
                by_level.index_add_(0, levels, torch.stack([losses, torch.ones_like(losses)], 1))
    transformer.train()
    summed: Any = accelerator.reduce(torch.cat([total, by_level.flatten()]), "sum")
    totals, sums = summed[: len(total)], summed[len(total) :].view(-1, 2)
    means: dict[str, float] = dict(zip(names, (totals[:-1] / totals[-1]).tolist(), strict=True))
    value = means["validation_loss"]
    if not math.isfinite(value):
        reason = (
            "the adapter's weights are ruined; lower optim.lr or raise optim.warmup and start over, or go on from an "
            "older checkpoint with resume=step-..."
        )
        if not step:
            reason = (
                f"nothing is learned yet, so that {job.model.path} or what was begun with is at fault: copy it again"
            )
        raise ValueError(f"the validation loss is {value}: {reason}")
    return Validation(means, [round(each, 6) for each in (sums[:, 0] / sums[:, 1]).tolist()])
