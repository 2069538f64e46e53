"""Near duplicates: how many changed copies are found, and how many different pictures are taken for copies."""

import io
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scripts.tiny.world import canvas, paint, sample_scene
from train.survey.duplicates import near, perceptual_hash, same

Change = Callable[[Image.Image, random.Random], Image.Image]


def photographs(count: int) -> list[Image.Image]:
    """Random pictures whose power falls with the frequency as photographs' does, in several shapes."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        height, width = rng.integers(120, 360, 2)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        slope = rng.uniform(0.9, 1.4)
        layers = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**slope, (height, width))
        layers /= layers.std(axis=(1, 2), keepdims=True)
        colours = np.array([[1, 0.35, 0.2], [1, -0.1, -0.3], [1, -0.3, 0.3]])  # mostly grey, as photographs are
        pixels = np.einsum("ij,jhw->hwi", colours, layers) * 45 + rng.uniform(70, 180, 3)
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return pictures


def scenes(count: int) -> list[Image.Image]:
    """Different scenes of the bundled world: flat colours, much alike, told apart by one small thing."""
    rng = random.Random(0)
    chosen = list(itertools.islice(dict.fromkeys((sample_scene(rng) for _ in range(2 * count)), 0), count))
    pixels = paint(canvas(chosen)).permute(0, 2, 3, 1)
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    return [Image.fromarray(array) for array in (pixels * 255).round().to(torch.uint8).numpy()]


def saved(picture: Image.Image, form: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=quality)
    return Image.open(buffer).convert("RGB")


def scaled(picture: Image.Image, factor: float) -> Image.Image:
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)


def cropped(picture: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """Without `share` of its width and height, taken from both ends as it comes."""
    width, height = picture.size
    left, top = rng.uniform(0, share * width), rng.uniform(0, share * height)
    return picture.crop((round(left), round(top), round(left + (1 - share) * width), round(top + (1 - share) * height)))


CHANGES: dict[str, tuple[Change, float, float]] = {  # share of the copies that may be missed: photographs, scenes
    "jpeg": (lambda picture, _: saved(picture, "JPEG", 30), 0, 0),
    "webp": (lambda picture, _: saved(picture, "WEBP", 60), 0, 0),
    "a quarter": (lambda picture, _: scaled(picture, 0.25), 0, 0),
    "double": (lambda picture, _: scaled(picture, 2), 0, 0),
    "another shape": (lambda picture, _: picture.resize((200, 150)), 0, 0),
    "cropped by 2 %": (lambda picture, rng: cropped(picture, 0.02, rng), 0, 0.05),
    "cropped by 5 %": (lambda picture, rng: cropped(picture, 0.05, rng), 0, 0.2),
    "cropped, scaled, saved": (lambda p, rng: saved(scaled(cropped(p, 0.04, rng), 0.6), "JPEG", 60), 0, 0.1),
}


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Image.Image], list[Image.Image]]:
    return photographs(60), scenes(300)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(pictures: tuple[list[Image.Image], list[Image.Image]], change: str) -> None:
    make, *bounds = CHANGES[change]
    rng = random.Random(0)
    for originals, bound in zip(pictures, bounds, strict=True):
        originals = originals[:60]
        pairs = [[perceptual_hash(picture), perceptual_hash(make(picture, rng))] for picture in originals]
        missed = sum(near(pair).groups != [[0, 1]] for pair in pairs)
        assert missed == sum(near(pair[::-1]).groups != [[0, 1]] for pair in pairs)
        assert missed <= bound * len(pairs)


def test_different_pictures_are_told_apart(pictures: tuple[list[Image.Image], list[Image.Image]]) -> None:
    photos, drawn = ([perceptual_hash(picture) for picture in many] for many in pictures)
    assert near(photos).groups == []
    wrong = sum(near([a, b]).groups != [] for a, b in itertools.combinations(drawn[:100], 2))
    assert wrong <= 0.001 * 100 * 99 / 2  # scenes that differ by the texture of a small thing
    grouped = sum(map(len, near(drawn).groups))
    assert grouped <= 0.15 * len(drawn)


def test_another_colour_is_another_picture() -> None:
    """What a hash of greys alone cannot see."""
    one, other = np.full((2, 96, 96, 3), 240, np.uint8)
    one[30:50, 30:50], other[30:50, 30:50] = (200, 60, 60), (60, 128, 60)
    grey = [np.asarray(Image.fromarray(pixels).convert("L"), int) for pixels in (one, other)]
    assert np.abs(grey[0] - grey[1]).max() <= 5
    assert near([perceptual_hash(Image.fromarray(pixels)) for pixels in (one, other)]).groups == []


def test_groups_are_connected_and_work_is_bounded() -> None:
    ramp = np.linspace(0, 100, 16)[None, :, None] + np.zeros((16, 16, 3))
    chain = [(ramp + 10 * step).astype(np.uint8) for step in range(6)]  # neighbours are near, the ends are not
    assert near([chain[0], chain[-1]]).groups == []
    far = np.full((16, 16, 3), 255, np.uint8)
    found = near([far, *chain])
    assert found.groups == [[1, 2, 3, 4, 5, 6]] and found.looked_at == found.candidates
    cut = near([far, *chain], most=2)
    assert cut.looked_at == 2 < cut.candidates
    assert near([]).groups == near([far]).groups == []


def test_many_pictures_are_compared_block_by_block() -> None:
    rng = np.random.default_rng(0)
    hashes = [*rng.integers(0, 255, (3000, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)]
    for i, j in [(0, 2999), (1500, 1501), (7, 2000)]:
        hashes[j] = hashes[i].clip(2, 250)
    assert near(hashes).groups == [[0, 2999], [7, 2000], [1500, 1501]]


@given(st.lists(st.one_of(st.none(), st.integers(0, 5))))
def test_same_groups_equal_keys(keys: list[int | None]) -> None:
    by_hand = {frozenset(i for i, key in enumerate(keys) if key == k) for k in set(keys) - {None}}
    assert {frozenset(group) for group in same(keys)} == {group for group in by_hand if len(group) > 1}
