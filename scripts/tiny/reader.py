"""A picture of the small world -> what is drawn on it, and in which colours.

The reader knows nothing of how a picture was made. It finds the ground's colour at the border, labels what differs
from it, and names each component by the best overlap with the shapes drawn into its box.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from scripts.tiny import world

LEAST_AREA = 0.003  # of the picture: smaller components are specks
LEAST_FIT = 0.6  # overlap with the best shape below which nothing is recognised
INK_WIDTH = 0.024  # of the side: how far inside a thing's edge its ink is looked for


@dataclass(frozen=True)
class Seen:
    """A thing read from a picture.

    `fit` is its overlap (IoU) with the shape named, `inked` says that its rim is black; x and y are fractions of the
    side.
    """

    shape: str
    colour: str
    inked: bool
    x: float
    y: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """Everything read from a picture."""

    things: tuple[Seen, ...]
    background: str


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    colours = np.array(list(palette.values())) / 255
    return list(palette)[int(((colours - rgb) ** 2).sum(1).argmin())]


def _templates(box: tuple[slice, slice], edge: float) -> np.ndarray:
    """Every shape drawn into a component's box, its line reaching `edge` pixels outwards: bool [shapes, h, w]."""
    height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
    grid_y, grid_x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    axis = torch.linspace(-world.REACH, world.REACH, world.TABLE)
    drawn = []
    for index, table in enumerate(world.distance_tables()):
        inside = table < 0
        ys, xs = axis[inside.any(1)], axis[inside.any(0)]
        top, bottom, left, right = ys[0], ys[-1], xs[0], xs[-1]
        # the radius whose extent fills the box, by the mean of both directions
        fit = (height - 2 * edge) / (bottom - top) + (width - 2 * edge) / (right - left)
        radius = max(float(fit) / 2, 1.0)
        x = (grid_x - width / 2) / radius + (left + right) / 2
        y = (grid_y - height / 2) / radius + (top + bottom) / 2
        distance = world.signed_distance(torch.tensor([index]), torch.stack([x, y], -1)[None])
        drawn.append((distance[0, 0] * radius < edge).numpy())
    return np.stack(drawn)


def read(picture: Image.Image) -> Reading:
    """Picture (square RGB) -> what it shows."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    side = pixels.shape[0]
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    strong = distance[distance > 0.2]
    threshold = max(0.2, 0.45 * float(np.percentile(strong, 30))) if strong.size else 1.0
    labels, _ = ndimage.label(distance > threshold, structure=np.ones((3, 3)))
    things = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[box] == number
        if component.sum() < LEAST_AREA * side * side:
            continue
        depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
        values = pixels[box][depth > 1.5]  # at the edge the ground is mixed in
        if not len(values):
            continue
        bright = values.max(1)  # textures and ink are dark
        rgb = np.median(values[bright >= np.percentile(bright, 75)], axis=0)
        rim = pixels[box][(depth > 1) & (depth <= INK_WIDTH * side + 1)].max(1)
        is_inked = bool((rim < 0.4).mean() > 0.6)
        shapes = _templates(box, world.LINE * side if is_inked else 0.0)
        overlap = (shapes & component).sum((1, 2)) / (shapes | component).sum((1, 2))
        best = int(overlap.argmax())
        things.append(
            Seen(
                world.SHAPES[best],
                _nearest(rgb, world.COLOURS),
                is_inked,
                (box[1].start + box[1].stop) / 2 / side,
                (box[0].start + box[0].stop) / 2 / side,
                float(overlap[best]),
            )
        )
    return Reading(tuple(things), _nearest(ground, world.BACKGROUNDS))
