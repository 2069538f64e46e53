"""What all ranks know of one update: every sample's loss, the gradient's norm, and what is asked for: to stop, to save,
to draw previews.

One sum over the ranks carries it; each rank fills its own entries and leaves the others 0. So all ranks decide alike,
bit for bit, and all know of a loss that is not finite on one rank before any weight changes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from train.data.batches import SampleIndex, share


@dataclass
class RankBatch:
    """A rank's part of one batch, which it learns from at once: samples of one size."""

    indices: list[SampleIndex]
    weight: float
    """Of each sample in the loss, before its source's weight."""
    micro: int
    """The index of the batch among those of the update."""
    slot: int
    """The index of the part in the batch: the rank's, if the run has as many ranks as it began with."""


def batches_of_rank(
    batches: list[list[SampleIndex]], rank: int, ranks: int, batch_size: int, original_ranks: int
) -> list[RankBatch]:
    """A rank's parts of an update's batches, which were made for `original_ranks` ranks; every rank gets equally many.

    With fewer ranks than that, each takes several in turn; with more, some take copies whose weight is 0. So the run
    learns from the mean over the same samples.
    """
    turns = -(-original_ranks // ranks)
    slots = [(micro, turn * ranks + rank) for micro in range(len(batches)) for turn in range(turns)]
    return [RankBatch(*share(batches[micro], slot, ranks, batch_size), micro, slot) for micro, slot in slots]


@dataclass
class Update:
    """One update, of all ranks together."""

    losses: list[tuple[SampleIndex, float, float]]
    """Every sample that counts: as the sampler names it, its loss, and its share of the update's loss
    before its source's weight."""
    norm: float
    """Of the gradient before clipping."""
    stop: bool
    save: bool
    sample: bool
    """Whether previews are asked for."""
    finite: bool
    """Whether every loss and gradient is."""


def reduce_update(
    accelerator: Accelerator,
    batch_size: int,
    losses: list[Tensor],
    norm: Tensor,
    stop: bool,
    save: bool,
    sample: bool = False,
) -> Tensor:
    """Sum what the ranks know of an update, without waiting for the device; `read_update` reads the result.

    losses: of this rank's samples, one tensor [b] per part. norm: the gradient's, []. stop, save, sample: it is
    enough if one rank asks for them.

    Returns: [ranks * parts * batch_size + 4], float64, the same on all ranks; finite if every loss and every norm is.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    losses_by_rank = torch.zeros(ranks, len(losses), batch_size, dtype=torch.float64, device=accelerator.device)
    for part, values in enumerate(losses):
        losses_by_rank[rank, part, : len(values)] = values
    # filled on the device: a copy from the host would wait for all work that is queued
    requests = [losses_by_rank.new_full((1,), float(request)) for request in (stop, save, sample)]
    reduced: Tensor = accelerator.reduce(
        torch.cat([losses_by_rank.flatten(), *requests, norm.detach().double().view(1)]), "sum"
    )
    return reduced


def read_update(
    reduced: Tensor, ranks: int, batches: list[list[SampleIndex]], batch_size: int, original_ranks: int
) -> Update:
    """Wait for the device, and read the result of `reduce_update`."""
    every = [batches_of_rank(batches, other, ranks, batch_size, original_ranks) for other in range(ranks)]
    values = reduced.tolist()
    *flat, stops, saves, asked, norms = values
    losses: Any = torch.tensor(flat, dtype=torch.float64).view(ranks, -1, batch_size).tolist()
    found = [
        (index, losses[other][number][i], part.weight / ranks / len(batches))
        for other, parts in enumerate(every)
        for number, part in enumerate(parts)
        if part.weight > 0
        for i, index in enumerate(part.indices)
    ]
    return Update(found, norms / ranks, stops > 0, saves > 0, asked > 0, all(map(math.isfinite, values)))
