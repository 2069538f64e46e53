"""A picture of the small world -> what is drawn on it, and in which colours.

The reader knows nothing of how a picture was made. It finds the ground's colour at the border, labels what is no
brighter or darker shade of it, and names each component by the best overlap with the shapes drawn into its box, and by
its hue.
"""

import colorsys
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from scripts.tiny import solids, world

LEAST_AREA = 0.004  # of the picture: smaller components are specks
LEAST_FIT = 0.6  # overlap with the best shape below which nothing is recognised
LEAST_HOLE = 0.0025  # of the picture: smaller holes of a thing are none
INK_WIDTH = 0.018  # of the side: how far inside a thing's edge its ink is looked for
BORDER = 4  # pixels on the left and on the right that show the ground
SHADES = (0.42, 1.25)  # darkest and brightest light on the ground, as a shadow and the falloff make it
PATTERNED = 0.088  # change of brightness' logarithm a pixel of 192: stripes and dots have more
GRAINED = 0.01  # how much that changes from one pixel to the one on the right: wood has more
GLOSS = 0.004  # of a thing: its least part that a shiny one has nearly white
STRONG, LEAST_STRONG = 0.15, 0.1  # distances from the ground: of what is surely a thing, and of what may be one's edge


@dataclass(frozen=True)
class Seen:
    """A thing read from a picture.

    `fit` is its overlap (IoU) with the shape named, `inked` says that its rim is black; x and y are fractions of the
    side. `texture` is not read of inked things: "".
    """

    shape: str
    colour: str
    inked: bool
    x: float
    y: float
    fit: float
    texture: str


@dataclass(frozen=True)
class Reading:
    """Everything read from a picture."""

    things: tuple[Seen, ...]
    background: str


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    colours = np.array(list(palette.values())) / 255
    return list(palette)[int(((colours - rgb) ** 2).sum(1).argmin())]


def _nearest_hue(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Light and gloss change how bright and how pale a colour is, its hue hardly."""
    hue = colorsys.rgb_to_hsv(*rgb)[0]
    apart = {name: abs((colorsys.rgb_to_hsv(*colour)[0] - hue + 0.5) % 1 - 0.5) for name, colour in palette.items()}
    return min(apart, key=apart.__getitem__)


@cache
def _extents() -> list[tuple[float, float, float, float]]:
    """Of every shape at radius 1: top, bottom, left, right."""
    axis = np.linspace(-solids.REACH, solids.REACH, solids.TABLE)
    inside = (solids.distance_tables() < 0).numpy()
    spans = [(axis[table.any(1)], axis[table.any(0)]) for table in inside]
    return [(ys[0], ys[-1], xs[0], xs[-1]) for ys, xs in spans]


def _templates(box: tuple[slice, slice], edge: float) -> np.ndarray:
    """Every shape drawn into a component's box, its line reaching `edge` pixels outwards: bool [shapes, h, w]."""
    height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
    grid_y, grid_x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    local, radii = [], []
    for top, bottom, left, right in _extents():
        # the radius whose extent fills the box, by the mean of both directions
        fit = (height - 2 * edge) / (bottom - top) + (width - 2 * edge) / (right - left)
        radii.append(max(fit / 2, 1.0))
        x = (grid_x - width / 2) / radii[-1] + (left + right) / 2
        y = (grid_y - height / 2) / radii[-1] + (top + bottom) / 2
        local.append(torch.stack([x, y], -1))
    distance = solids.signed_distance(torch.arange(len(radii)), torch.stack(local).float())[:, 0]
    return (distance * torch.tensor(radii)[:, None, None] < edge).numpy()


def _ground(pixels: np.ndarray) -> np.ndarray:
    """Colour of the wall and the floor at every row, [side, 1, 3], from what the left and the right border show."""
    side = len(pixels)
    border = np.concatenate([pixels[:, :BORDER], pixels[:, -BORDER:]], 1)
    rows = np.median(border, axis=1)
    smooth: np.ndarray = ndimage.median_filter(rows, (side // 8 * 2 + 1, 1), mode="nearest")
    return smooth[:, None]


def _unlike(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """How far each pixel is from the nearest shade of the ground, [side, side]."""
    light = ((pixels * ground).sum(-1) / (ground * ground).sum(-1).clip(1e-9)).clip(*SHADES)
    apart: np.ndarray = np.linalg.norm(pixels - light[..., None] * ground, axis=-1)
    return apart


def _components(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Numbers of the things, [side, side], 0 where there is none."""
    unlike = _unlike(pixels, ground)
    strong = unlike[unlike > STRONG]
    threshold = max(LEAST_STRONG, 0.42 * float(np.median(strong))) if strong.size else 1.0
    numbers: np.ndarray = ndimage.label(unlike > threshold, structure=np.ones((3, 3)))[0]
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        inside = numbers[box]
        # a gloss may look like the ground: a thing's holes are filled, but for the one in its middle, a ring's
        holes = ndimage.label(ndimage.binary_fill_holes(inside == number) & (inside != number))[0]
        middle = holes[holes.shape[0] // 2, holes.shape[1] // 2]
        if middle and (holes == middle).sum() < LEAST_HOLE * numbers.size:
            middle = 0
        inside[(holes > 0) & (holes != middle)] = number
    return numbers


def _texture(values: np.ndarray, component: np.ndarray, depth: np.ndarray, scale: float) -> str:
    """What a thing is made of, by how its brightness changes from pixel to pixel, `scale` pixels of 1/192 of the side:
    values [h, w, 3], component and depth [h, w]."""
    inner = depth > 3 / scale
    if not inner.any():
        return "plain"
    logarithm, weight = np.log(values.max(2) + 0.05), component.astype(float)
    smooth = [ndimage.gaussian_filter(part, 0.8 / scale) for part in (logarithm * weight, weight)]
    slopes = np.gradient(smooth[0] / smooth[1].clip(1e-3))
    down, right = (slope[inner] / scale for slope in slopes)
    # the direction of most change, and how much more change it has than the one across
    twice, less = 2 * (right * down).mean(), (right**2).mean() - (down**2).mean()
    change = (right**2).mean() + (down**2).mean()
    if change**0.5 > PATTERNED:
        return "striped" if np.hypot(less, twice) > 0.45 * change else "dotted"
    pale = values.min(2)[inner]
    if (pale - np.median(pale) > 0.3).mean() > GLOSS:
        return "shiny"
    bent = np.abs(np.gradient(slopes[1], axis=1)[inner]) / scale**2  # light changes evenly, grain up and down
    return "wooden" if np.median(bent) > GRAINED else "plain"


def read(picture: Image.Image) -> Reading:
    """Picture (square RGB) -> what it shows."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    side = pixels.shape[0]
    ground = _ground(pixels)
    numbers = _components(pixels, ground)
    things = []
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        component = numbers[box] == number
        if component.sum() < LEAST_AREA * side * side:
            continue
        depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
        values = pixels[box][depth > 1.5]  # at the edge the ground is mixed in
        if not len(values):
            continue
        vivid = values.max(1) - values.min(1)  # ink, gloss and the dark of textures are not
        rgb = np.median(values[vivid >= np.percentile(vivid, 70)], axis=0)
        rim = pixels[box][(depth > 1) & (depth <= INK_WIDTH * side + 1)]
        is_inked = bool(((rim.max(1) < 0.36) & (np.ptp(rim, 1) < 0.15)).mean() > 0.5)
        shapes = _templates(box, world.LINE * side if is_inked else 0.0)
        overlap = (shapes & component).sum((1, 2)) / (shapes | component).sum((1, 2))
        best = int(overlap.argmax())
        things.append(
            Seen(
                world.SHAPES[best],
                _nearest_hue(rgb, world.COLOURS),
                is_inked,
                (box[1].start + box[1].stop) / 2 / side,
                (box[0].start + box[0].stop) / 2 / side,
                float(overlap[best]),
                "" if is_inked else _texture(pixels[box], component, depth, 192 / side),
            )
        )
    # the floor's colour, where no shadow lies: the brighter ones of the lower half
    floor = ground[side // 2 :, 0]
    bright = floor[floor.sum(1) >= np.percentile(floor.sum(1), 50)]
    return Reading(tuple(things), _nearest(np.median(bright, axis=0), world.BACKGROUNDS))
