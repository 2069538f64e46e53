"""What all ranks know of one update: every sample's loss, the gradient's norm, and whether to stop or to save.

One sum over the ranks tells it, in which each rank fills its own places: whatever follows from it is decided alike by
all, bit for bit, and a loss that is not finite on one rank is known to all before any weight has changed.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from train.data.batches import Place, share


@dataclass
class Part:
    """What a rank learns from at once: samples of one size, and what each of them counts."""

    places: list[Place]
    weight: float
    micro: int
    """Which of the update's batches it is from."""
    slot: int
    """Its number in that batch: the rank's, where the run has as many ranks as it began with."""


def divide(batches: list[list[Place]], rank: int, ranks: int, batch_size: int, begun: int) -> list[Part]:
    """A rank's parts of an update's batches, which were made for `begun` ranks: as many for every rank.

    With fewer ranks each takes several in turn, with more some take copies that count nothing: what is learned stays
    the mean over the same samples.
    """
    turns = -(-begun // ranks)
    slots = [(micro, turn * ranks + rank) for micro in range(len(batches)) for turn in range(turns)]
    return [Part(*share(batches[micro], slot, ranks, batch_size), micro, slot) for micro, slot in slots]


@dataclass
class Update:
    """Of all ranks together."""

    losses: list[tuple[Place, float, float]]
    """Every sample that counts: its loss, and its share of the update's loss before its source's weight."""
    norm: float
    """Of the gradient, before it is clipped."""
    stop: bool
    save: bool
    finite: bool
    """Whether every loss and gradient is."""


def tell(
    accelerator: Accelerator, batch_size: int, losses: list[Tensor], norm: Tensor, stop: bool, save: bool
) -> Tensor:
    """What `hear` reads, alike on all ranks; it is finite where every loss and every rank's norm are.

    losses: of this rank's samples, [b] a part; norm: [], on the device too; any rank's `stop` counts, and any rank's
    `save`.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    own = torch.zeros(ranks, len(losses), batch_size, dtype=torch.float64, device=accelerator.device)
    for part, values in enumerate(losses):
        own[rank, part, : len(values)] = values
    # filled there: a copy from the host would wait for all that is queued
    wishes = [own.new_full((1,), float(wish)) for wish in (stop, save)]
    told: Tensor = accelerator.reduce(torch.cat([own.flatten(), *wishes, norm.detach().double().view(1)]), "sum")
    return told


def hear(told: Tensor, ranks: int, batches: list[list[Place]], batch_size: int, begun: int) -> Update:
    """Wait for the device and read what all ranks told."""
    every = [divide(batches, other, ranks, batch_size, begun) for other in range(ranks)]
    heard = told.tolist()
    *flat, stops, saves, norms = heard
    losses: Any = torch.tensor(flat, dtype=torch.float64).view(ranks, -1, batch_size).tolist()
    found = [
        (place, losses[other][number][i], part.weight / ranks / len(batches))
        for other, parts in enumerate(every)
        for number, part in enumerate(parts)
        if part.weight > 0
        for i, place in enumerate(part.places)
    ]
    return Update(found, norms / ranks, stops > 0, saves > 0, all(map(math.isfinite, heard)))
