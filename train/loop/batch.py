"""Places in the stream -> encoded samples, noised: what the transformer is trained and measured on."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.sample.encode import Text
from train.data.batches import Place, Stream
from train.data.buckets import View
from train.data.caption import draw_text, texts_of
from train.data.dataset import Data, Sample, sources_of, split
from train.data.seeds import generator
from train.latents.store import Cache
from train.objective.flow_matching import sample_sigma
from train.run.config import Train


@dataclass
class Samples:
    """What is trained on and what is held out, as indices into all samples, which are those of the cache."""

    all: list[Sample]
    train: list[int]
    validation: list[int]

    def fingerprint(self, cache: Cache) -> str:
        """A hash of what is trained on and what is held out, in their order: pictures, masks and captions."""
        parts = [
            [[cache.identity(i), cache.pictures[i].mask, self.all[i].captions] for i in chosen]
            for chosen in (self.train, self.validation)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def choose(samples: list[Sample], cache: Cache, data: Data, seed: int) -> Samples:
    """Hold out a share of the samples; class pictures are all trained on."""
    sources = sources_of(data)
    prior = [i for i, sample in enumerate(samples) if sources[sample.source].prior]
    own = [i for i, sample in enumerate(samples) if not sources[sample.source].prior]
    train, held = split([cache.identity(i) for i in own], data.validation, seed)
    return Samples(samples, [own[i] for i in train] + prior, [own[i] for i in held])


def make_stream(samples: Samples, cache: Cache, data: Data, seed: int, ranks: int) -> Stream:
    """The stream of what is trained on."""
    sources = sources_of(data)
    drawn_from = [samples.all[i].source for i in samples.train]
    repeats = [sources[source].repeats for source in drawn_from]
    if data.prior.path or data.prior.count:
        last = len(sources) - 1  # prior preservation's; it follows the others in number
        own = sum(repeat for repeat, source in zip(repeats, drawn_from, strict=True) if source != last)
        each = data.prior.ratio * own / max(1, drawn_from.count(last))
        repeats = [each if source == last else repeat for repeat, source in zip(repeats, drawn_from, strict=True)]
    sizes = [[(views[0].height, views[0].width) for views in cache.views(i)] for i in samples.train]
    return Stream(seed, data.batch_size * ranks, samples.train, sizes, repeats)


@dataclass
class Batch:
    """Encoded samples, noised; b samples of one size."""

    x0: Tensor  # latents [b, channels, height, width]
    noise: Tensor  # like x0
    sigma: Tensor  # [b]
    t5: Tensor  # [b, text tokens, width]
    pooled: Tensor  # [b, width]
    mask: Tensor | None  # what counts of each latent, [b, 1, height, width]; None: all of all
    weight: Tensor  # of each sample in the loss, [b]


@dataclass
class _Part:
    """One sample of a batch."""

    x0: Tensor
    noise: Tensor
    sigma: Tensor
    text: Text
    mask: Tensor | None
    weight: float


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; on CUDA behind what is queued there, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _stack(parts: list[_Part], device: torch.device) -> Batch:
    mask = None
    if any(part.mask is not None for part in parts):
        ones = torch.ones(parts[0].x0.shape[1:])
        mask = _send(torch.stack([ones if part.mask is None else part.mask for part in parts])[:, None], device)
    return Batch(
        _send(torch.stack([part.x0 for part in parts]), device),
        _send(torch.stack([part.noise for part in parts]), device),
        _send(torch.stack([part.sigma for part in parts]), device),
        _send(torch.stack([part.text.t5 for part in parts]), device),
        _send(torch.stack([part.text.pooled for part in parts]), device),
        mask,
        _send(torch.tensor([part.weight for part in parts]), device),
    )


def choices(job: Train, cache: Cache, samples: Samples, place: Place) -> tuple[View, str]:
    """The view and the text of a sample at a place."""
    own = generator(job.seed, "choice", place.epoch, place.position)
    views = cache.views(place.sample)[place.resolution]
    view = views[int(torch.randint(len(views), (), generator=own))]
    return view, draw_text(samples.all[place.sample], job.data, own)


def training_batch(
    job: Train, cache: Cache, samples: Samples, places: list[Place], weight: float, device: torch.device
) -> Batch:
    """The samples at these places, each of which counts `weight` times its source's own weight."""
    sources = sources_of(job.data)
    parts = []
    for place in places:
        view, text = choices(job, cache, samples, place)
        mean, deviation = cache.picture(place.sample, view)
        own = generator(job.seed, "sample", place.epoch, place.position)
        x0 = mean + deviation * torch.randn(mean.shape, generator=own)
        noise = torch.randn(mean.shape, generator=own)
        tokens = mean.shape[1] * mean.shape[2] // 4
        sigma = sample_sigma(job.flow, 1, tokens, own)[0]
        counts = weight * sources[samples.all[place.sample].source].weight
        parts.append(_Part(x0, noise, sigma, cache.text(text), cache.mask(place.sample, view), counts))
    return _stack(parts, device)


Held = tuple[int, int, View]  # a sample, a noise level, the view at which it is measured


def validation_parts(job: Train, cache: Cache, samples: Samples, rank: int, ranks: int) -> list[list[Held]]:
    """What a rank measures of the held-out pictures, by the batch: each at the first resolution, in its first crop, at
    evenly spaced noise levels."""
    items = [(i, level) for i in samples.validation for level in range(job.validation_levels)][rank::ranks]
    by_size = defaultdict(list)
    for index, level in items:
        view = cache.views(index)[0][0]
        by_size[view.height, view.width].append((index, level, view))
    size = job.data.batch_size
    return [alike[first : first + size] for alike in by_size.values() for first in range(0, len(alike), size)]


def validation_batch(job: Train, cache: Cache, samples: Samples, held: list[Held], device: torch.device) -> Batch:
    """One of them, at noise that is fixed for each picture and level, with the first caption as written."""
    parts = []
    for index, level, view in held:
        mean, _ = cache.picture(index, view)
        own = generator(job.seed, "validation", cache.identity(index), level)
        noise = torch.randn(mean.shape, generator=own)
        sigma = torch.tensor((level + 0.5) / job.validation_levels)
        text = cache.text(texts_of(samples.all[index], job.data)[0][0])
        parts.append(_Part(mean, noise, sigma, text, cache.mask(index, view), 1.0))
    return _stack(parts, device)


def largest_batch(job: Train, cache: Cache, samples: Samples, device: torch.device) -> Batch:
    """A batch like the largest of the run, with clean latents, to measure what it takes."""
    views = [(view, i) for i in samples.train for views in cache.views(i) for view in views[:1]]
    view, index = max(views, key=lambda pair: pair[0].height * pair[0].width)
    mean, _ = cache.picture(index, view)
    text = cache.text(texts_of(samples.all[index], job.data)[0][0])
    mask = cache.mask(index, view)
    part = _Part(mean, torch.zeros_like(mean), torch.tensor(0.5), text, mask, 1.0)
    return _stack([part] * job.data.batch_size, device)
