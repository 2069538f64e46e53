"""Buckets against a search through all sizes, crops against Pillow and NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.buckets import bucket_of, cut, cut_mask, is_smaller, views_of
from train.data.dataset import Data
from train.data.view import View

SIDES = st.integers(16, 700)
RESOLUTIONS = st.sampled_from([16, 64, 128, 256, 512])


def all_sizes(
    width: int, height: int, resolution: int, step: int, aspect: float, upscale: bool
) -> set[tuple[int, int]]:
    """Every size that is allowed, by trying each."""
    most = range(step, int(resolution * math.sqrt(aspect)) + 2, step)
    return {
        (w, h)
        for w in most
        for h in most
        if w * h <= resolution**2 and max(w, h) <= aspect * min(w, h) and (upscale or (w <= width and h <= height))
    }


def kept(width: int, height: int, size: tuple[int, int]) -> float:
    """The share of the picture that the largest box of this shape covers."""
    w, h = size
    scale = max(w / width, h / height)
    return w * h / (scale * width * scale * height)


@given(SIDES, SIDES, RESOLUTIONS, st.sampled_from([16, 32, 64]), st.sampled_from([1.0, 1.5, 2.0, 4.0]), st.booleans())
def test_bucket_cuts_least(width: int, height: int, resolution: int, step: int, aspect: float, upscale: bool) -> None:
    allowed = all_sizes(width, height, resolution, step, aspect, upscale)
    if not allowed:  # too small for the step, or the resolution is smaller
        step = 16
        allowed = all_sizes(width, height, resolution, step, aspect, upscale)
    w, h = bucket_of(width, height, resolution, step, aspect, upscale)
    assert (w, h) in allowed
    # neither side can be longer, and no other size of which that holds keeps more of the picture
    whole = {(a, b) for a, b in allowed if (a + step, b) not in allowed and (a, b + step) not in allowed}
    assert (w, h) in whole
    assert kept(width, height, (w, h)) >= max(kept(width, height, size) for size in whole) - 1e-9
    if upscale or (width >= resolution * aspect and height >= resolution * aspect):
        assert (w + step) * (h + step) > resolution**2 or max(w, h) + step > aspect * min(w, h)
    assert bucket_of(height, width, resolution, step, aspect, upscale) == (h, w)


@given(SIDES, SIDES, st.lists(RESOLUTIONS, min_size=1, max_size=3, unique=True), st.integers(1, 4), st.booleans())
def test_views(width: int, height: int, resolutions: list[int], crops: int, flip: bool) -> None:
    data = Data("a", resolutions, crops=crops, flip=flip)
    views = views_of(width, height, data)
    assert len(views) == len(resolutions)
    for alike in views:
        assert 1 <= len(alike) <= crops * (1 + flip) and len(set(alike)) == len(alike)
        assert len({(view.height, view.width) for view in alike}) == 1
        assert [view.flip for view in alike] == [False, True] * (len(alike) // 2) if flip else not alike[0].flip
        boxes = []
        for view in alike:
            left, top, right, bottom = view.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) / (bottom - top) == pytest.approx(view.width / view.height, rel=1e-6)
            assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)  # as large as can be
            assert right - left >= view.width - 1e-6  # nothing is enlarged
            boxes.append(view.box)
        # together they are symmetric around the middle
        assert sum(left + right for left, _, right, _ in boxes) / len(boxes) == pytest.approx(width)
        assert sum(top + bottom for _, top, _, bottom in boxes) / len(boxes) == pytest.approx(height)


def sizes(width: int, height: int, **options: Any) -> list[tuple[int, int]]:
    return [(views[0].width, views[0].height) for views in views_of(width, height, Data("a", **options))]


def test_examples() -> None:
    assert sizes(512, 512) == sizes(3000, 3000) == [(512, 512)]
    assert sizes(1920, 1080, resolution=[512, 1024]) == [(672, 384), (1360, 768)]
    assert sizes(1080, 1920, resolution=[512, 1024]) == [(384, 672), (768, 1360)]
    assert sizes(100, 100) == [(96, 96)] and sizes(100, 100, upscale=True) == [(512, 512)]
    assert sizes(600, 400, resolution=[512, 1024]) == [(592, 400), (592, 400)]
    assert sizes(4000, 1000, aspect=1) == [(512, 512)] and sizes(4000, 1000, aspect=4) == [(1024, 256)]
    assert sizes(1920, 1080, bucket_step=64) == [(640, 384)]
    assert sizes(50, 500, bucket_step=64) == [(48, 96)]
    middle, whole = (
        views_of(300, 100, Data("a", 96, crops=1, aspect=1)),
        views_of(300, 100, Data("a", 96, crops=3, aspect=1)),
    )
    assert [view.box[0] for view in middle[0]] == [100] and [view.box[0] for view in whole[0]] == [0, 100, 200]


@pytest.mark.parametrize("size", [(15, 300), (300, 15), (1, 1)])
def test_tiny_pictures_are_refused_unless_enlarged(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"^is {size[0]}x{size[1]}, less than 16 pixels a side.*data.upscale=true"):
        views_of(*size, Data("a"))
    assert views_of(*size, Data("a", upscale=True))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def levels(pixels: torch.Tensor) -> np.ndarray:
    return ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy()


def test_a_square_is_the_middle() -> None:
    wide = noise(300, 96)
    data = Data("a", 48, aspect=1, flip=True)
    ((plain, flipped),) = views_of(300, 96, data)
    pixels = cut(wide, plain)
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.float32
    by_hand = wide.resize((150, 48), Image.Resampling.LANCZOS).crop((51, 0, 99, 48))
    assert np.array_equal(levels(pixels), np.asarray(by_hand))
    assert np.array_equal(levels(cut(wide, flipped)), np.asarray(by_hand)[:, ::-1])
    ((upright, _),) = views_of(96, 300, data)
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    by_hand = tall.resize((48, 150), Image.Resampling.LANCZOS).crop((0, 51, 48, 99))
    assert np.array_equal(levels(cut(tall, upright)), np.asarray(by_hand))


def test_pixels_are_in_range() -> None:
    ends = np.zeros((16, 16, 3), np.uint8)
    ends[3, 5] = 0, 255, 51
    (((view,),)) = views_of(16, 16, Data("a", 16))
    same = cut(Image.fromarray(ends), view)
    torch.testing.assert_close(same[:, 3, 5], torch.tensor([-1.0, 1.0, -0.6]))
    assert float(same.sum()) == pytest.approx(-3 * 256 + 2.4, abs=1e-3)


@settings(max_examples=30)
@given(st.integers(32, 90), st.integers(32, 90), st.booleans(), st.integers(1, 2))
def test_masks_are_cut_like_their_pictures(width: int, height: int, flip: bool, crops: int) -> None:
    """Where the picture is white the mask is: the mean of the pixels that a latent covers."""
    ramp = np.linspace(0, 255, width)[None, :] * np.linspace(0.2, 1, height)[:, None]
    mask = Image.fromarray(ramp.astype(np.uint8))
    for views in views_of(width, height, Data("a", 32, flip=flip, crops=crops, aspect=1.5)):
        for view in views:
            weights = cut_mask(mask, view)
            assert weights.shape == (view.height // 8, view.width // 8) and weights.dtype == torch.float32
            shades = (cut(mask.convert("RGB"), view)[0] + 1) / 2
            means = shades.reshape(view.height // 8, 8, view.width // 8, 8).mean((1, 3))
            assert (weights - means).abs().max() < 0.03


def test_a_mask_at_its_own_size_is_exact() -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:16, :24] = 255
    mask[0, 47] = 64
    weights = cut_mask(Image.fromarray(mask), View(32, 48, (0.0, 0.0, 48.0, 32.0), False))
    expected = mask.reshape(4, 8, 6, 8).mean((1, 3)) / 255
    np.testing.assert_allclose(weights.numpy(), expected, atol=0.5 / 255)
    assert weights[:2, :3].eq(1).all() and weights[2:].eq(0).all()


@pytest.mark.parametrize(
    "size, options, smaller",
    [
        ((64, 64), {}, False),
        ((65, 64), {}, False),  # what is cut is not smaller
        ((48, 64), {}, True),
        ((48, 64), {"upscale": True}, False),
        ((96, 96), {"resolution": [64, 128]}, True),
    ],
)
def test_pictures_that_are_trained_at_their_own_size(
    size: tuple[int, int], options: dict[str, Any], smaller: bool
) -> None:
    data = Data("x", **({"resolution": 64} | options))
    assert is_smaller(*size, views_of(*size, data), data) == smaller
