"""Pictures and captions examined before anything is trained on them."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from infer.sample.picture import decode, pixel_hash, pixels_of
from train.data.buckets import bucket_of, reference_view, views_of
from train.data.caption import dressed, texts_of
from train.data.dataset import Data, sources_of
from train.data.mask import decode_mask
from train.data.source import Reference, Sample, Skipped
from train.data.view import View
from train.latents.workers import Room, work_ahead
from train.survey.duplicates import Near, near, perceptual_hash, same


@dataclass(frozen=True)
class Picture:
    """One picture that can be trained on."""

    width: int
    height: int
    views: list[list[View]]
    """One list a resolution."""
    pixels: str
    """The hash of its decoded pixels."""
    grid: NDArray[np.uint8]
    """Its perceptual hash."""


@dataclass(frozen=True)
class Fit:
    """How a picture goes into its bucket at one resolution."""

    resolution: int
    width: int
    height: int
    """Of the bucket."""
    cut: float
    """Share of the picture that lies outside the box of a view."""
    scale: float
    """Pixels of the bucket over pixels of the box; above 1 the picture is enlarged."""
    smaller: bool
    """Whether the picture is too small for the bucket that the resolution asks for."""


@dataclass
class Survey:
    """Every sample that was listed, and what was found. An index, here and in its groups, is that of `samples`."""

    samples: list[Sample]
    pictures: list[Picture | None]
    """Of each sample; None if it is broken."""
    skipped: list[Skipped]
    """All that cannot be used, with their reasons."""
    fits: list[list[Fit]]
    """Of each sample; one a resolution."""
    copies: list[list[int]]
    """Groups of equal pixels."""
    near: Near
    """Groups of near duplicates, one sample for each set of copies."""
    texts: list[list[str]]
    """Of each sample: every text that it is trained with."""
    lengths: dict[str, int] | None
    """text tokens of each text, its end mark included; None without a tokenizer."""
    length: int | None
    """text tokens that are seen; None without a tokenizer."""
    untriggered: list[int]
    """Samples with a caption that lacks the trigger."""
    shared: list[list[int]]
    """Groups with an equal caption."""
    notes: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Of a sample: what to know about it."""

    @property
    def usable(self) -> list[int]:
        return [index for index, picture in enumerate(self.pictures) if picture is not None]

    @property
    def truncated(self) -> list[str]:
        """Texts whose end the text encoder does not see."""
        if self.lengths is None or self.length is None:
            return []
        return [text for text, tokens in self.lengths.items() if tokens > self.length]

    def buckets(self) -> dict[tuple[int, int, int], list[Fit]]:
        """The pictures of each (resolution, width, height), in that order."""
        buckets: dict[tuple[int, int, int], list[Fit]] = defaultdict(list)
        for index in self.usable:
            for fit in self.fits[index]:
                buckets[fit.resolution, fit.width, fit.height].append(fit)
        return dict(sorted(buckets.items()))


def survey(
    data: Data,
    samples: list[Sample],
    skipped: Sequence[Skipped],
    count_tokens: Callable[[list[str]], list[int]] | None,
    length: int | None,
    workers: int,
    room: Room,
    progress: Callable[[], object],
) -> Survey:
    """Decode every picture once, some at a time, and compare.

    skipped: what the reader refused already. length: text tokens that are seen. room: bounds what is decoded at once.
    progress: called once a sample.
    """
    pictures: list[Picture | None] = []
    broken = list(skipped)
    for found in work_ahead(lambda sample: _examine(sample, data, room), samples, workers):
        if isinstance(found, Skipped):
            broken.append(found)
        pictures.append(found if isinstance(found, Picture) else None)
        progress()
    usable = [index for index, picture in enumerate(pictures) if picture is not None]
    copies = same(picture.pixels if picture else None for picture in pictures)
    further = {index for group in copies for index in group[1:]}
    single = [index for index in usable if index not in further]
    alike = near([picture.grid for index in single if (picture := pictures[index]) is not None])
    alike.groups = [[single[i] for i in group] for group in alike.groups]
    texts = [[text for orders in texts_of(sample, data) for text in orders] for sample in samples]
    lengths = None
    if count_tokens is not None:
        distinct = list(dict.fromkeys(text for index in usable for text in texts[index]))
        lengths = dict(zip(distinct, count_tokens(distinct), strict=True))
    given = sources_of(data)
    training = [
        index for index in usable if not given[samples[index].source].prior
    ]  # class pictures share by intention
    captions = [(index, caption) for index in training for caption in samples[index].captions]
    bare = [index for index, caption in captions if dressed(caption, data) != f"{data.prefix}{caption}{data.suffix}"]
    shared = [sorted({captions[i][0] for i in group}) for group in same(caption for _, caption in captions)]
    result = Survey(
        samples,
        pictures,
        broken,
        [_fits(picture, data) if picture else [] for picture in pictures],
        copies,
        alike,
        texts,
        lengths,
        length,
        sorted(set(bare)),
        [group for group in shared if len(group) > 1],  # not one picture with a caption twice
    )
    _note(result)
    return result


def _examine(sample: Sample, data: Data, room: Room) -> Picture | Skipped:
    try:
        content = sample.read()
        with room(pixels_of(content)):
            picture = decode(content, sample.name, data.background, data.most_pixels)
            if sample.read_mask is not None:
                decode_mask(sample.read_mask(), f"the mask of {sample.name}", picture.size, data.most_pixels)
            views = views_of(*picture.size, data)
            found = Picture(picture.width, picture.height, views, pixel_hash(picture), perceptual_hash(picture))
        for reference in sample.references:
            _examine_reference(reference, found, data, room)
        return found
    except ValueError as error:
        return Skipped(sample.name, str(error).removeprefix(sample.name).strip())


def _examine_reference(reference: Reference, picture: Picture, data: Data, room: Room) -> None:
    """Raises:
    ValueError: a sample's reference cannot be used; the message follows the sample's name.
    """
    name = f"has the reference {reference.name}, which"
    content = reference.read()
    with room(pixels_of(content)):
        size = decode(content, name, data.background, data.most_pixels).size
    for resolution, views in zip(data.resolutions, picture.views, strict=True):
        try:
            reference_view(size, (picture.width, picture.height), views[0], resolution, data)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error


def _fits(picture: Picture, data: Data) -> list[Fit]:
    fits = []
    for resolution, (view, *_) in zip(data.resolutions, picture.views, strict=True):
        left, top, right, bottom = view.box
        share = (right - left) * (bottom - top) / (picture.width * picture.height)
        asked = bucket_of(picture.width, picture.height, resolution, data.bucket_step, data.aspect, True)
        smaller = view.width * view.height < asked[0] * asked[1] and not data.upscale
        fits.append(Fit(resolution, view.width, view.height, 1 - share, round(view.width / (right - left), 6), smaller))
    return fits


def _note(found: Survey) -> None:
    """Say of each sample what was found about it."""
    notes, samples = found.notes, found.samples
    for group in found.copies:
        for index in group:
            notes[index].append(f"same pixels as {samples[group[index == group[0]]].name}")
    for group in found.near.groups:
        for index in group:
            notes[index].append(f"nearly {samples[group[index == group[0]]].name}")
    cut_short = set(found.truncated)
    shared = {index for group in found.shared for index in group}
    untriggered = set(found.untriggered)
    for index in found.usable:
        if cut_short.intersection(found.texts[index]):
            notes[index].append("caption truncated")
        if index in untriggered:
            notes[index].append("trigger added")
        if index in shared:
            notes[index].append("caption shared")
        for what, chosen in (
            ("smaller than asked", [fit for fit in found.fits[index] if fit.smaller]),
            ("enlarged", [fit for fit in found.fits[index] if fit.scale > 1]),
        ):
            if chosen:
                notes[index].append(f"{what} at {', '.join(str(fit.resolution) for fit in chosen)}")


def sources(found: Survey) -> list[tuple[int, int, int]]:
    """(source, usable samples, those with a mask) of each source."""
    usable = Counter(found.samples[index].source for index in found.usable)
    masked = Counter(found.samples[p].source for p in found.usable if found.samples[p].read_mask is not None)
    return [(source, count, masked[source]) for source, count in sorted(usable.items())]


def reasons(found: Survey) -> dict[str, int]:
    """How many are left out for each kind of reason, the commonest first."""
    return dict(Counter(re.split(r"[;:(]", skipped.reason)[0].strip() for skipped in found.skipped).most_common())
