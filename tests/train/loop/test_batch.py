"""Batches of a small stand-in for the cache: what each sample is trained with, and what it counts."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from infer.family.family import Text
from train.data.batches import Form, batches_from, epoch_batches, share
from train.data.buckets import views_of
from train.data.caption import texts_of
from train.data.dataset import Data, Prior
from train.data.source import Sample, Source
from train.data.view import View
from train.loop.batch import (
    Samples,
    batch_sampler,
    draw_view_and_text,
    split_samples,
    training_batch,
    validation_batch,
    validation_items,
)
from train.objective.preservation import Preserve
from train.run.config import Train

CPU = torch.device("cpu")
SIZES = [(64, 64), (100, 64), (64, 110), (64, 64), (130, 90), (64, 64)]


class Numbers:
    """A cache whose latents say which sample and view they are of, and whose texts say which text."""

    def __init__(self, data: Data, masked: set[int] | None = None) -> None:
        self.data, self.masked, self.asked = data, masked or set(), list[tuple[int, View]]()

    def views(self, index: int) -> list[list[View]]:
        return views_of(*SIZES[index % len(SIZES)], self.data)

    def forms(self, index: int) -> list[Form]:
        return [((views[0].height, views[0].width),) for views in self.views(index)]

    def references(self, index: int, view: View, resolution: int) -> list[Tensor]:
        return []

    def identity(self, index: int) -> str:
        return f"pixels {index}"

    def picture(self, index: int, view: View) -> tuple[Tensor, Tensor]:
        self.asked.append((index, view))
        assert view in [one for alike in self.views(index) for one in alike]
        mean = torch.full((16, view.height // 8, view.width // 8), float(index))
        return mean, torch.zeros_like(mean)

    def mask(self, index: int, view: View) -> Tensor | None:
        return torch.full((view.height // 8, view.width // 8), 0.25) if index in self.masked else None

    def text(self, text: str) -> Text:
        return Text(torch.tensor([[float(len(text))]]), torch.tensor([float(sum(text.encode()))]))


def samples_of(*sources: int) -> list[Sample]:
    return [
        Sample(f"s{i}", (f"caption {i}", f"other, caption, {i}"), source, bytes) for i, source in enumerate(sources)
    ]


def set_up(data: Data, sources: tuple[int, ...], masked: set[int] | None = None) -> tuple[Train, Any, Samples]:
    job, cache = Train(data=data), Numbers(data, masked)
    return job, cache, split_samples(samples_of(*sources), cache, data, 0)  # type: ignore[arg-type]


def test_each_latent_has_a_text_of_its_own_sample() -> None:
    data = Data("a", [32, 64], 3, trigger="sks", flip=True, crops=2, tag_orders=4, caption_dropout=0.2, validation=0.3)
    job, cache, samples = set_up(data, (0,) * 12)
    sampler = batch_sampler(samples, cache, data, 0, 1)
    seen, texts = set(), set()
    for indices in islice(batches_from(sampler, 0), 120):
        batch = training_batch(job, cache, samples, indices, 1.0, CPU)
        for i, index in enumerate(indices):
            sample = int(batch.x0[i].mean())
            assert sample == index.sample and sample in samples.train
            allowed = ["", *(text for orders in texts_of(samples.all[sample], data) for text in orders)]
            numbers = {(float(len(text)), float(sum(text.encode()))): text for text in allowed}
            texts.add(numbers[float(batch.embeds[i]), float(batch.pooled[i])])
            seen.add(cache.asked[i - len(indices)])
    # every view and every text has its turn
    assert {index for index, _ in seen} == set(samples.train)
    assert seen == {(i, view) for i in samples.train for alike in cache.views(i) for view in alike}
    assert len(texts) > 12 and "" in texts


def test_a_place_says_all() -> None:
    """The same numbers alone and in company, on any rank."""
    data = Data("a", 64, 4, validation=0)
    job, cache, samples = set_up(data, (0, 0, 0, 0))
    indices = next(batches_from(batch_sampler(samples, cache, data, 0, 1), 0))
    whole = training_batch(job, cache, samples, indices, 1.0, CPU)
    for i, index in enumerate(indices):
        alone = training_batch(job, cache, samples, [index], 1.0, CPU)
        for name in ("x0", "noise", "sigma", "embeds", "pooled"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[i])
    assert len(set(whole.sigma.tolist())) == len(indices)
    other = training_batch(job, cache, samples, [indices[0]._replace(epoch=1)], 1.0, CPU)
    assert not torch.equal(other.noise[0], whole.noise[0])


def test_masks_and_weights() -> None:
    data = Data(
        resolution=64, batch_size=8, validation=0, sources=[Source("a", weight=0.5), Source("b", weight=2.0)], aspect=1
    )
    job, cache, samples = set_up(data, (0, 1, 1, 0), masked={1})
    for indices in islice(batches_from(batch_sampler(samples, cache, data, 0, 2), 0), 6):
        part, weight = share(indices, 0, 2, 8)
        batch = training_batch(job, cache, samples, part, weight, CPU)
        held = [index.sample for index in part]
        assert batch.weight.tolist() == [weight * (0.5, 2.0, 2.0, 0.5)[index] for index in held]
        if 1 in held:
            assert batch.mask is not None and batch.mask.shape == (len(part), 1, *batch.x0.shape[2:])
            assert batch.mask.flatten(1).mean(1).tolist() == [0.25 if index == 1 else 1.0 for index in held]
        else:
            assert batch.mask is None


def test_class_pictures_are_as_many_as_asked_and_never_held_out() -> None:
    data = Data("a", 64, 2, validation=0.4, aspect=1, prior=Prior("dogs", "a dog", ratio=0.5, weight=0.1))
    _, cache, samples = set_up(data, (0,) * 5 + (1,) * 20)
    assert len(samples.train) == 3 + 20 and all(i < 5 for i in samples.validation)
    sampler = batch_sampler(samples, cache, data, 0, 1)
    own = [i < 5 for epoch in range(40) for batch in batches_of(sampler, epoch) for i in batch]
    assert sum(own) == 40 * 3
    assert len(own) - sum(own) == pytest.approx(40 * 1.5, abs=1)
    by_hand = Data(sources=[Source("a"), Source("b", prior=True, repeats=2)], resolution=64)
    _, cache, samples = set_up(by_hand, (0,) * 5 + (1,) * 3)
    assert batch_sampler(samples, cache, by_hand, 0, 1).repeats == [1.0] * 4 + [2.0] * 3


def batches_of(sampler: Any, epoch: int) -> list[list[int]]:
    return [[index.sample for index in batch] for batch in epoch_batches(sampler, epoch)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_is_the_same_on_any_number_of_ranks(ranks: int) -> None:
    data = Data("a", [64, 32], 4, validation=0.5, flip=True, caption_dropout=0.5, trigger="sks")
    job, cache, samples = set_up(data, (0,) * 12, masked={1})
    job = replace(job, validation_levels=3)

    def measured(rank: int, of: int) -> dict[tuple[int, float], Tensor]:
        found = {}
        for held in validation_items(job, cache, samples, rank, of):
            batch = validation_batch(job, cache, samples, held, CPU)
            for i in range(len(batch.x0)):
                index = int(batch.x0[i].mean())
                found[index, round(float(batch.sigma[i]), 3)] = batch.noise[i]
                assert float(batch.embeds[i]) == len(f"sks, caption {index}")  # as written, never dropped
                assert batch.weight[i] == 1
        return found

    whole = measured(0, 1)
    assert whole.keys() == {(i, level) for i in samples.validation for level in (0.167, 0.5, 0.833)}
    parts = [measured(rank, ranks) for rank in range(ranks)]
    assert sum(map(len, parts)) == len(whole)
    assert all(torch.equal(noise, whole[key]) for part in parts for key, noise in part.items())
    assert {view for _, view in cache.asked} <= {cache.views(i)[0][0] for i in samples.validation}


def test_each_sample_keeps_its_own_text() -> None:
    """The class's text of what it is trained with, in validation too; none without output preservation."""
    data = Data("a", 64, 2, trigger="sks", caption_dropout=0.3, validation=0.3)
    plain, cache, samples = set_up(data, (0,) * 6)
    job = replace(plain, preserve=Preserve("class", "caption"))
    sampler = batch_sampler(samples, cache, data, 0, 1)
    indices = [index for each in islice(batches_from(sampler, 0), 20) for index in each]
    seen = set()
    for index in indices:
        batch = training_batch(job, cache, samples, [index], 1.0, CPU)
        assert training_batch(plain, cache, samples, [index], 1.0, CPU).kept_embeds is None
        _, text = draw_view_and_text(job, cache, samples, index)
        expected = cache.text(text.removeprefix("sks, "))
        assert batch.kept_embeds is not None and batch.kept_pooled is not None and expected.pooled is not None
        assert torch.equal(batch.kept_embeds[0], expected.embeds) and torch.equal(batch.kept_pooled[0], expected.pooled)
        seen.add(text)
    assert "" in seen and len(seen) > 3
    (items, *_) = validation_items(job, cache, samples, 0, 1)
    held = validation_batch(job, cache, samples, items, CPU)
    first = cache.text(samples.all[items[0][0]].captions[0])
    assert held.kept_embeds is not None and torch.equal(held.kept_embeds[0], first.embeds)
