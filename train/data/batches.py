"""The batch sampler: which samples are trained together, in which order, at which resolution, without an end.

An epoch shuffles its samples and puts them into queues in that order. There is one queue for each form: the size of the
picture and the sizes of its references. A full queue is a batch; the rest of each queue becomes a short batch at the
end. So each sample is seen once an epoch (times its repeats), in a batch of one form. Everything follows from
(seed, epoch): the number of ranks decides only who takes which part of a batch, and a run that resumes needs no
history.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from train.data.seeds import generator

Size = tuple[int, int]  # height, width
Form = tuple[Size, ...]
"""What samples of a batch have in common: the picture's size, and those of its references."""


class SampleIndex(NamedTuple):
    """A sample as the sampler names it: everything random about it is drawn from its epoch and position."""

    epoch: int
    position: int
    """Within the epoch."""
    sample: int
    resolution: int
    """Index into the resolutions."""
    references: bool = True
    """Whether it is trained with its references, if it has some."""


@dataclass(frozen=True)
class BatchSampler:
    """What the batches of every epoch follow from."""

    seed: int
    group: int
    """Samples a batch, on all ranks together."""
    samples: list[int]
    forms: list[list[Form]]
    """Of each sample, at each resolution."""
    repeats: list[float]
    """Of each sample: times an epoch; fractions take turns."""
    reference_dropout: float = 0.0
    """Share of the places at which a sample's references are left out."""

    def __post_init__(self) -> None:
        assert self.group >= 1 and self.samples and all(repeat > 0 for repeat in self.repeats)
        assert len(self.samples) == len(self.forms) == len(self.repeats)


def epoch_indices(sampler: BatchSampler, epoch: int) -> list[SampleIndex]:
    """An epoch's samples in the order in which they are taken; `sample` is an index into `sampler.samples`."""
    repeats = torch.tensor(sampler.repeats, dtype=torch.float64)
    turns = torch.empty_like(repeats)
    for repeat in set(sampler.repeats):
        # spread evenly, so that each epoch has the same number within one, whatever the order of the files' names
        alike = (repeats == repeat).nonzero()[:, 0]
        scattered = torch.randperm(len(alike), generator=generator(sampler.seed, "turns"))
        turns[alike] = (scattered.double() + 0.5) / len(alike)
    counts = (repeats * (epoch + 1) + turns).floor() - (repeats * epoch + turns).floor()
    entries = torch.arange(len(repeats)).repeat_interleave(counts.long())
    order = torch.randperm(len(entries), generator=generator(sampler.seed, "epoch", epoch))
    resolutions = torch.zeros(len(entries), dtype=torch.long)
    several = len(sampler.forms[0])
    if several > 1:
        resolutions = torch.randint(several, (len(entries),), generator=generator(sampler.seed, "resolution", epoch))
    shown = torch.ones(len(entries), dtype=torch.bool)
    if sampler.reference_dropout > 0:
        numbers = torch.rand(len(entries), generator=generator(sampler.seed, "references", epoch), dtype=torch.float64)
        shown = numbers >= sampler.reference_dropout
    taken = zip(entries[order].tolist(), resolutions.tolist(), shown.tolist(), strict=True)
    return [SampleIndex(epoch, position, *each) for position, each in enumerate(taken)]


def epoch_batches(sampler: BatchSampler, epoch: int) -> list[list[SampleIndex]]:
    """An epoch's batches; `sample` is what `sampler.samples` holds."""
    queues: dict[Form, list[SampleIndex]] = {}
    batches = []
    for index in epoch_indices(sampler, epoch):
        form = sampler.forms[index.sample][index.resolution]
        form = form if index.references else form[:1]
        queue = queues.setdefault(form, [])
        queue.append(index._replace(sample=sampler.samples[index.sample]))
        if len(queue) == sampler.group:
            batches.append(queues.pop(form))
    return batches + list(queues.values())


def batches_from(sampler: BatchSampler, first: int) -> Iterator[list[SampleIndex]]:
    """The batches of all epochs, without an end, from number `first` on."""
    epoch = 0
    while True:
        batches = epoch_batches(sampler, epoch)
        yield from batches[first:]
        first = max(0, first - len(batches))
        epoch += 1


def share(batch: list[SampleIndex], rank: int, ranks: int, batch_size: int) -> tuple[list[SampleIndex], float]:
    """A rank's part of a batch, and what each of its samples counts, so that the mean over the ranks of the sums is the
    mean over the batch. A rank for which nothing is left takes the first sample and counts it 0."""
    part = batch[rank * batch_size : (rank + 1) * batch_size]
    return (part, ranks / len(batch)) if part else (batch[:1], 0.0)
