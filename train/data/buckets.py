"""A picture's size -> the sizes and crops at which it is trained.

A bucket is a height and a width that the model can pack, with as many pixels as the resolution's square or a little
fewer. A picture goes to the bucket that cuts least from it. None is enlarged unless data.upscale says so: what is
smaller than the resolution gets a smaller bucket.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.dataset import Data
from train.data.view import View, scaled

Size = tuple[int, int]
PACKED = 16  # pixels a packed token, each way
LATENT = 8  # pixels a latent, each way


@lru_cache(maxsize=100_000)
def bucket_of(width: int, height: int, resolution: int, step: int, aspect: float, upscale: bool) -> tuple[int, int]:
    """Width and height of the bucket of a picture of width x height pixels.

    Possible are sizes whose sides are multiples of `step`, whose area is at most resolution^2, whose longer side is at
    most `aspect` times the shorter, and which the picture covers (unless upscale). Of those whose sides could not be
    longer it is the one that cuts least, then the largest.

    Raises:
        ValueError: a side of the picture is shorter than 16 pixels; the message follows its name.
    """
    area = resolution**2

    def longest(other: int, side: int) -> int:
        """The longest side that goes with the other one, for a picture whose side is `side`."""
        limits = [area // other, int(other * aspect), *([] if upscale else [side])]
        return min(limits) // step * step

    best = None
    for w in range(step, int(resolution * aspect) + 1, step):
        h = longest(w, height)
        if h < step or longest(h, width) != w:
            continue
        cut = 1 - min(width * h, height * w) / max(width * h, height * w)
        if best is None or (cut, -w * h) < best[0]:
            best = (cut, -w * h), (w, h)
    if best is not None:
        return best[1]
    if step > PACKED:  # too small for this step
        return bucket_of(width, height, resolution, PACKED, aspect, upscale)
    raise ValueError(
        f"is {width}x{height}, less than {PACKED} pixels a side: take it out, or set data.upscale=true to enlarge it"
    )


def is_smaller(width: int, height: int, views: list[list[View]], data: Data) -> bool:
    """Whether a picture is trained at its own size somewhere, as it is smaller than what was asked for."""
    if data.upscale:
        return False
    asked = (bucket_of(width, height, each, data.bucket_step, data.aspect, True) for each in data.resolutions)
    return any(view[0].width * view[0].height < w * h for view, (w, h) in zip(views, asked, strict=True))


def views_of(width: int, height: int, data: Data) -> list[list[View]]:
    """The views of a picture of width x height pixels: one list a resolution, of its crops, evenly spread
    over what the bucket cuts away, each unflipped first.

    Raises:
        ValueError: the picture is too small for a bucket; the message follows its name.
    """
    views = []
    for resolution in data.resolutions:
        w, h = bucket_of(width, height, resolution, data.bucket_step, data.aspect, data.upscale)
        # the largest box of the bucket's shape; one side is the picture's own
        across, down = min(float(width), height * w / h), min(float(height), width * h / w)
        slack = max((width - across) * w / across, (height - down) * h / down)
        crops = min(data.crops, 1 + int(slack))  # none less than a pixel from the next
        boxes = []
        for crop in range(crops):
            fraction = crop / (crops - 1) if crops > 1 else 0.5
            left, top = (width - across) * fraction, (height - down) * fraction
            boxes.append((left, top, min(left + across, float(width)), min(top + down, float(height))))
        flips = (False, True) if data.flip else (False,)
        views.append([View(h, w, box, flip) for box in boxes for flip in flips])
    return views


def reference_view(reference: Size, picture: Size, view: View, resolution: int, data: Data) -> View:
    """The view of a reference that goes with a picture's view at a resolution; sizes: width and height in pixels.

    One as large as its picture is cut like it, so that what stands at one place in both stays there; with
    data.reference_resolution, and where the sizes differ, it is the middle of the reference in a bucket of its own.
    It is mirrored if the picture is.

    Raises:
        ValueError: the reference is too small for a bucket; the message follows its name.
    """
    if reference == picture and data.reference_resolution is None:
        return view
    asked = data.reference_resolution or resolution
    w, h = bucket_of(*reference, asked, data.bucket_step, data.aspect, data.upscale)
    width, height = reference
    across, down = min(float(width), height * w / h), min(float(height), width * h / w)
    left, top = (width - across) / 2, (height - down) / 2
    box = left, top, min(left + across, float(width)), min(top + down, float(height))
    return View(h, w, box, view.flip)


def cut(picture: Image.Image, view: View) -> Tensor:
    """The pixels of a view of an upright RGB picture, [3, height, width] in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(scaled(picture, view), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return pixels.flip(2) if view.flip else pixels


def cut_mask(mask: Image.Image, view: View) -> Tensor:
    """A view of a mask, [height / 8, width / 8] in [0, 1]: each latent gets the mean of what it covers."""
    size = view.width // LATENT, view.height // LATENT
    small = mask.resize(size, Image.Resampling.BOX, box=view.box)
    weights = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
    return weights.flip(1) if view.flip else weights
