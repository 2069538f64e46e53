"""The endless stream of batches: which samples are trained together, at which place, at which resolution.

An epoch shuffles its samples and takes them in that order into queues, one a form, which is the size of the picture and
those of its references; a queue that is full is a batch, and what is left in the queues at the end goes out as short
batches. So each sample is seen once an epoch (times its repeats), in a batch of one form, and everything follows from
(seed, epoch): the number of ranks changes nothing but who takes which part of a batch, and a run that resumes needs no
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


class Place(NamedTuple):
    """A sample's place in the stream, from which everything random about it is drawn."""

    epoch: int
    position: int
    """Within the epoch."""
    sample: int
    resolution: int
    """Index into the resolutions."""
    references: bool = True
    """Whether it is trained with its references, if it has some."""


@dataclass(frozen=True)
class Stream:
    """What the stream is made of."""

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


def epoch_places(stream: Stream, epoch: int) -> list[Place]:
    """An epoch's samples in the order in which they are taken."""
    repeats = torch.tensor(stream.repeats, dtype=torch.float64)
    turns = torch.empty_like(repeats)
    for repeat in set(stream.repeats):
        # spread evenly, so that each epoch has the same number within one, in an order that is no file's name's
        alike = (repeats == repeat).nonzero()[:, 0]
        scattered = torch.randperm(len(alike), generator=generator(stream.seed, "turns"))
        turns[alike] = (scattered.double() + 0.5) / len(alike)
    counts = (repeats * (epoch + 1) + turns).floor() - (repeats * epoch + turns).floor()
    entries = torch.arange(len(repeats)).repeat_interleave(counts.long())
    order = torch.randperm(len(entries), generator=generator(stream.seed, "epoch", epoch))
    resolutions = torch.zeros(len(entries), dtype=torch.long)
    several = len(stream.forms[0])
    if several > 1:
        resolutions = torch.randint(several, (len(entries),), generator=generator(stream.seed, "resolution", epoch))
    shown = torch.ones(len(entries), dtype=torch.bool)
    if stream.reference_dropout > 0:
        numbers = torch.rand(len(entries), generator=generator(stream.seed, "references", epoch), dtype=torch.float64)
        shown = numbers >= stream.reference_dropout
    taken = zip(entries[order].tolist(), resolutions.tolist(), shown.tolist(), strict=True)
    return [Place(epoch, position, *each) for position, each in enumerate(taken)]


def epoch_batches(stream: Stream, epoch: int) -> list[list[Place]]:
    """An epoch's batches; `sample` is what `stream.samples` says."""
    queues: dict[Form, list[Place]] = {}
    batches = []
    for place in epoch_places(stream, epoch):
        form = stream.forms[place.sample][place.resolution]
        form = form if place.references else form[:1]
        queue = queues.setdefault(form, [])
        queue.append(place._replace(sample=stream.samples[place.sample]))
        if len(queue) == stream.group:
            batches.append(queues.pop(form))
    return batches + list(queues.values())


def batches_from(stream: Stream, first: int) -> Iterator[list[Place]]:
    """The endless stream, from its batch number `first` on."""
    epoch = 0
    while True:
        batches = epoch_batches(stream, epoch)
        yield from batches[first:]
        first = max(0, first - len(batches))
        epoch += 1


def share(batch: list[Place], rank: int, ranks: int, batch_size: int) -> tuple[list[Place], float]:
    """A rank's part of a batch, and what each of its samples counts, so that the mean over the ranks of the sums is the
    mean over the batch. A rank for which nothing is left takes the first sample and counts it 0."""
    own = batch[rank * batch_size : (rank + 1) * batch_size]
    return (own, ranks / len(batch)) if own else (batch[:1], 0.0)
