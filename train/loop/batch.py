"""What the sampler names -> batches of encoded samples with noise, for training and validation."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from infer.family.family import Text
from train.data.batches import BatchSampler, SampleIndex
from train.data.caption import draw_text, texts_of
from train.data.dataset import Data, sources_of
from train.data.seeds import generator
from train.data.source import Sample
from train.data.split import split
from train.data.view import View
from train.latents.store import Cache
from train.objective.flow_matching import sample_sigma
from train.objective.preservation import preserved_text
from train.run.config import Train


@dataclass
class Samples:
    """Which samples are trained on and which are held out, as indices into all samples, which are also the cache's."""

    all: list[Sample]
    train: list[int]
    validation: list[int]

    def fingerprint(self, cache: Cache) -> str:
        """A hash of the pictures, masks, captions and references that are trained on and held out, in their order."""
        parts = [[self._content(cache, i) for i in chosen] for chosen in (self.train, self.validation)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _content(self, cache: Cache, index: int) -> list[object]:
        """What a sample is made of."""
        picture = cache.pictures[index]
        references = [[one.identity for one in picture.references]] if picture.references else []
        return [picture.identity, picture.mask, self.all[index].captions, *references]


def split_samples(samples: list[Sample], cache: Cache, data: Data, seed: int) -> Samples:
    """Hold out a share of the samples; all class pictures are trained on."""
    sources = sources_of(data)
    prior = [i for i, sample in enumerate(samples) if sources[sample.source].prior]
    subject = [i for i, sample in enumerate(samples) if not sources[sample.source].prior]
    train, held_out = split([cache.identity(i) for i in subject], data.validation, seed)
    return Samples(samples, [subject[i] for i in train] + prior, [subject[i] for i in held_out])


def batch_sampler(samples: Samples, cache: Cache, data: Data, seed: int, ranks: int) -> BatchSampler:
    """The order in which the samples are trained on; ranks: the process count that the run began with."""
    sources = sources_of(data)
    source_of = [samples.all[i].source for i in samples.train]
    repeats = [sources[source].repeats for source in source_of]
    if data.prior.path or data.prior.count:
        prior = len(sources) - 1  # the class pictures' source is the last
        others = sum(repeat for repeat, source in zip(repeats, source_of, strict=True) if source != prior)
        each = data.prior.ratio * others / max(1, source_of.count(prior))
        repeats = [each if source == prior else repeat for repeat, source in zip(repeats, source_of, strict=True)]
    forms = [cache.forms(i) for i in samples.train]
    return BatchSampler(seed, data.batch_size * ranks, samples.train, forms, repeats, data.reference_dropout)


@dataclass
class Batch:
    """b encoded samples of one form, with their noise."""

    x0: Tensor  # latents [b, channels, height, width]
    noise: Tensor  # like x0
    sigma: Tensor  # [b]
    embeds: Tensor  # [b, text tokens, width]
    pooled: Tensor | None  # [b, width], where the transformer takes a pooled text
    mask: Tensor | None  # how much each latent counts, [b, 1, height, width]; None: all count fully
    weight: Tensor  # of each sample in the loss, [b]
    kept_embeds: Tensor | None = None  # of the texts that are preserved, like embeds and pooled
    kept_pooled: Tensor | None = None
    references: tuple[Tensor, ...] = ()  # latents of their references, each [b, channels, its own height, width]


def tensors_of(batch: Batch) -> list[Tensor | None]:
    """All tensors of a batch, the references last."""
    *single, references = vars(batch).values()
    return [*single, *references]


def batch_of(tensors: Sequence[Tensor | None]) -> Batch:
    """The way back."""
    names = [each.name for each in fields(Batch)][:-1]
    given: dict[str, Any] = dict(zip(names, tensors, strict=False))
    return Batch(**given, references=tuple(tensors[len(names) :]))  # type: ignore[arg-type]


@dataclass
class _Item:
    """One sample of a batch."""

    x0: Tensor
    noise: Tensor
    sigma: Tensor
    text: Text
    mask: Tensor | None
    weight: float
    references: list[Tensor]
    kept: Text | None


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; on CUDA the copy is queued, and nothing waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _stack(items: list[_Item], device: torch.device) -> Batch:
    mask = None
    texts, kept = [item.text for item in items], [item.kept for item in items if item.kept is not None]
    if any(item.mask is not None for item in items):
        ones = torch.ones(items[0].x0.shape[1:])
        mask = _send(torch.stack([ones if item.mask is None else item.mask for item in items])[:, None], device)
    pooled, kept_pooled = (_stacked([text.pooled for text in each], device) for each in (texts, kept))
    return Batch(
        _send(torch.stack([item.x0 for item in items]), device),
        _send(torch.stack([item.noise for item in items]), device),
        _send(torch.stack([item.sigma for item in items]), device),
        _send(torch.stack([text.embeds for text in texts]), device),
        pooled,
        mask,
        _send(torch.tensor([item.weight for item in items]), device),
        _stacked([text.embeds for text in kept], device),
        kept_pooled,
        tuple(_send(torch.stack(alike), device) for alike in zip(*(item.references for item in items), strict=True)),
    )


def _stacked(tensors: list[Tensor | None], device: torch.device) -> Tensor | None:
    """None where there are none."""
    there = [tensor for tensor in tensors if tensor is not None]
    return _send(torch.stack(there), device) if there else None


def kept_text(job: Train, cache: Cache, text: str) -> Text | None:
    """What is preserved while a text is learned, encoded; None where nothing is."""
    if job.preserve.kind == "none":
        return None
    return cache.text(preserved_text(text, job.preserve, job.data.trigger))


def draw_view_and_text(job: Train, cache: Cache, samples: Samples, index: SampleIndex) -> tuple[View, str]:
    """The view and the text with which the sample is trained."""
    numbers = generator(job.seed, "choice", index.epoch, index.position)
    views = cache.views(index.sample)[index.resolution]
    view = views[int(torch.randint(len(views), (), generator=numbers))]
    return view, draw_text(samples.all[index.sample], job.data, numbers)


def training_batch(
    job: Train, cache: Cache, samples: Samples, indices: list[SampleIndex], weight: float, device: torch.device
) -> Batch:
    """These samples; each counts `weight` times its source's weight."""
    sources = sources_of(job.data)
    parts = []
    for index in indices:
        view, text = draw_view_and_text(job, cache, samples, index)
        mean, deviation = cache.picture(index.sample, view)
        numbers = generator(job.seed, "sample", index.epoch, index.position)
        x0 = mean if deviation is None else mean + deviation * torch.randn(mean.shape, generator=numbers)
        noise = torch.randn(mean.shape, generator=numbers)
        tokens = mean.shape[1] * mean.shape[2] // 4
        sigma = sample_sigma(job.flow, 1, tokens, numbers)[0]
        counts = weight * sources[samples.all[index.sample].source].weight
        mask, kept = cache.mask(index.sample, view), kept_text(job, cache, text)
        references = cache.references(index.sample, view, index.resolution) if index.references else []
        parts.append(_Item(x0, noise, sigma, cache.text(text), mask, counts, references, kept))
    return _stack(parts, device)


HeldOut = tuple[int, int, View]  # a sample, a noise level, and the view that is measured


def validation_items(job: Train, cache: Cache, samples: Samples, rank: int, ranks: int) -> list[list[HeldOut]]:
    """What a rank measures of the held-out pictures, in batches: each at the first resolution, in its first crop, at
    evenly spaced noise levels."""
    items = [(i, level) for i in samples.validation for level in range(job.validation_levels)][rank::ranks]
    by_form = defaultdict(list)
    for index, level in items:
        by_form[cache.forms(index)[0]].append((index, level, cache.views(index)[0][0]))
    size = job.data.batch_size
    return [group[first : first + size] for group in by_form.values() for first in range(0, len(group), size)]


def validation_batch(job: Train, cache: Cache, samples: Samples, items: list[HeldOut], device: torch.device) -> Batch:
    """A batch of held-out pictures with noise that is fixed per picture and level, and the first caption as written."""
    parts = []
    for index, level, view in items:
        mean, _ = cache.picture(index, view)
        numbers = generator(job.seed, "validation", cache.identity(index), level)
        noise = torch.randn(mean.shape, generator=numbers)
        sigma = torch.tensor((level + 0.5) / job.validation_levels)
        text = texts_of(samples.all[index], job.data)[0][0]
        mask, kept = cache.mask(index, view), kept_text(job, cache, text)
        references = cache.references(index, view, 0)
        parts.append(_Item(mean, noise, sigma, cache.text(text), mask, 1.0, references, kept))
    return _stack(parts, device)


def largest_batch(job: Train, cache: Cache, samples: Samples, device: torch.device) -> Batch:
    """A batch as large as the run's largest, with clean latents, to measure how much memory it needs."""
    forms = [(form, i, k) for i in samples.train for k, form in enumerate(cache.forms(i))]
    _, index, resolution = max(forms, key=lambda one: sum(height * width for height, width in one[0]))
    view = cache.views(index)[resolution][0]
    mean, _ = cache.picture(index, view)
    text = texts_of(samples.all[index], job.data)[0][0]
    mask, kept = cache.mask(index, view), kept_text(job, cache, text)
    references = cache.references(index, view, resolution)
    part = _Item(mean, torch.zeros_like(mean), torch.tensor(0.5), cache.text(text), mask, 1.0, references, kept)
    return _stack([part] * job.data.batch_size, device)
