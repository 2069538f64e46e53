"""The sampler against what an epoch promises: each sample as often as it should be, in batches of one size."""

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data.batches import BatchSampler, SampleIndex, batches_from, epoch_batches, epoch_indices, share
from train.data.seeds import generator

SIZES = [(64, 64), (48, 80), (80, 48)]


@st.composite
def samplers(draw: st.DrawFn, whole: bool = False) -> BatchSampler:
    count = draw(st.integers(1, 30))
    resolutions = draw(st.integers(1, 3))
    size = st.lists(st.sampled_from([(size,) for size in SIZES]), min_size=resolutions, max_size=resolutions)
    repeat = st.sampled_from([1.0, 2.0] if whole else [0.25, 1 / 3, 0.7, 1.0, 1.5, 3.0])
    return BatchSampler(
        draw(st.integers(0, 5)),
        draw(st.integers(1, 8)),
        draw(st.lists(st.integers(0, 999), min_size=count, max_size=count, unique=True)),
        draw(st.lists(size, min_size=count, max_size=count)),
        draw(st.lists(repeat, min_size=count, max_size=count)),
    )


@given(samplers(whole=True), st.integers(0, 40))
def test_an_epoch_has_each_sample_once_times_its_repeats(sampler: BatchSampler, epoch: int) -> None:
    batches = epoch_batches(sampler, epoch)
    seen = Counter(index.sample for batch in batches for index in batch)
    assert seen == dict(zip(sampler.samples, map(int, sampler.repeats), strict=True))
    indices = [index for batch in batches for index in batch]
    assert sorted(index.position for index in indices) == list(range(len(indices)))
    assert {index.epoch for index in indices} == {epoch}


@given(samplers(), st.integers(0, 40))
def test_batches_are_of_one_size_and_full_but_the_last_of_each(sampler: BatchSampler, epoch: int) -> None:
    short = []
    for batch in epoch_batches(sampler, epoch):
        found = {sampler.forms[sampler.samples.index(index.sample)][index.resolution] for index in batch}
        assert len(found) == 1 and 1 <= len(batch) <= sampler.group
        positions = [index.position for index in batch]
        assert positions == sorted(positions)  # the order of the epoch
        if len(batch) < sampler.group:
            short += found
        else:
            assert not short  # full ones come first
    assert len(short) == len(set(short))  # at most one a size


@given(samplers())
def test_fractions_take_turns_evenly(sampler: BatchSampler) -> None:
    epochs = [Counter(index.sample for index in epoch_indices(sampler, epoch)) for epoch in range(12)]
    for entry, repeat in enumerate(sampler.repeats):
        total = sum(epoch[entry] for epoch in epochs)
        assert abs(total - 12 * repeat) < 1 + 1e-6
        assert all(int(repeat) <= epoch[entry] <= int(repeat) + 1 for epoch in epochs)
    for repeat in set(sampler.repeats):
        alike = [i for i, value in enumerate(sampler.repeats) if value == repeat]
        for epoch in epochs:
            assert abs(sum(epoch[i] for i in alike) - repeat * len(alike)) <= 1 + 1e-6


@given(samplers(), st.integers(0, 60), st.integers(0, 30))
def test_resuming_needs_no_history(sampler: BatchSampler, first: int, count: int) -> None:
    whole = list(islice(batches_from(sampler, 0), first + count))
    assert list(islice(batches_from(sampler, first), count)) == whole[first:]


@given(samplers(), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_a_batch(sampler: BatchSampler, ranks: int, batch_size: int) -> None:
    """What the ranks take is the batch, and the mean over ranks of their weighted sums is the mean over the batch."""
    sampler = BatchSampler(sampler.seed, ranks * batch_size, sampler.samples, sampler.forms, sampler.repeats)
    for batch in islice(batches_from(sampler, 0), 20):
        taken, mean = [], 0.0
        for rank in range(ranks):
            indices, weight = share(batch, rank, ranks, batch_size)
            assert 1 <= len(indices) <= batch_size  # every rank has something to do: none waits for ever
            taken += indices if weight else []
            mean += sum(weight * index.position for index in indices) / ranks
        assert taken == batch
        assert mean == pytest.approx(sum(index.position for index in batch) / len(batch))


def test_one_size_is_the_plain_shuffled_stream() -> None:
    sampler = BatchSampler(3, 4, list(range(10)), [[(64, 64)]] * 10, [1.0] * 10)
    for epoch in range(3):
        order = torch.randperm(10, generator=generator(3, "epoch", epoch)).tolist()
        batches = epoch_batches(sampler, epoch)
        assert [index.sample for batch in batches for index in batch] == order
        assert [len(batch) for batch in batches] == [4, 4, 2]
    assert order != list(range(10))
    assert next(batches_from(sampler, 5))[0] == SampleIndex(1, 8, epoch_indices(sampler, 1)[8].sample, 0)


def test_resolutions_and_seeds_differ() -> None:
    sampler = BatchSampler(0, 2, list(range(40)), [[(64, 64), (128, 128)]] * 40, [1.0] * 40)
    drawn = [[index.resolution for index in epoch_indices(sampler, epoch)] for epoch in range(4)]
    assert all(8 < sum(epoch) < 32 for epoch in drawn) and len(set(map(tuple, drawn))) == 4
    other = BatchSampler(1, 2, sampler.samples, sampler.forms, sampler.repeats)
    assert epoch_indices(other, 0) != epoch_indices(sampler, 0)
