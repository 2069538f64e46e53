"""How the small world's things are lit: materials, one light from the upper left, shadows, and the room behind.

All functions take batches of tensors on one device; `rows` are those pictures that have the thing.
"""

import math
from functools import cache

import torch
from torch import Tensor

from scripts.tiny import solids

HORIZON = 0.36  # where the floor ends, of the side from the top: every thing stands below it
LIGHT = (-0.46, -0.58, 0.67)  # to the light: from the upper left, before the picture
WARM, SHADE = (1.0, 0.985, 0.95), (1.05, 0.94, 1.0)  # the light's colour, and what is left where it does not reach
LEAN, FLAT = 0.62, 0.3  # of a cast shadow: how far it goes to the right and into the depth, a thing's height being 1


def _colour(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 3, 1, 1)


def _unit(values: tuple[float, float, float]) -> tuple[float, ...]:
    return tuple(value / math.hypot(*values) for value in values)


def _rise(value: Tensor, low: float, high: float) -> Tensor:
    """From 0 to 1 between two values, smoothly."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


@cache
def _tables(device: torch.device) -> Tensor:
    """Distance and normals of every shape, [shapes, 4, TABLE, TABLE]."""
    return torch.cat([solids.distance_tables()[:, None], solids.normal_tables()], 1).to(device)


def surface(shape: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Shape [batch], local [batch, h, w, 2] in radii -> distance to the edge [batch, 1, h, w] in radii, and normals
    [batch, 3, h, w]."""
    found = solids.looked_up(_tables(local.device), shape, local)
    return found[:, :1] + (local.abs().amax(-1) - solids.REACH).clamp(min=0)[:, None], found[:, 1:]


def room(ground: Tensor, size: int) -> Tensor:
    """Colours [batch, 3] -> a floor and a wall that meet softly, brighter on the left: [batch, 3, size, size]."""
    axis = (torch.arange(size, device=ground.device) + 0.5) / size
    y, x = axis[:, None], axis[None, :]
    floor = _rise(y, HORIZON - 0.05, HORIZON + 0.07)
    wall_light = 1.0 - 0.13 * torch.hypot(x - 0.3, (y - 0.05) * 1.2)
    floor_light = 1.05 - 0.14 * torch.hypot(x - 0.42, (y - 0.72) * 1.1)
    corner = 0.05 * torch.exp(-(((y - HORIZON) / 0.05) ** 2))  # where they meet less light arrives
    light = (wall_light + (floor_light - wall_light) * floor) * (1 - corner)
    light = light - 0.08 * (torch.hypot(x - 0.5, y - 0.5) / 0.707) ** 4
    base = ground[:, :, None, None]
    deep = base**1.35  # the wall is the same colour, deeper
    return (deep + (base - deep) * (0.3 + 0.7 * floor)) * light


def shadow(shape: Tensor, xyr: Tensor, size: int) -> Tensor:
    """What is left of the light on the floor: shape [rows], xyr [rows, 3] -> [rows, 1, size, size] of at most 1."""
    x, y, radius = (xyr[:, i, None, None, None] for i in range(3))
    axis = (torch.arange(size, device=xyr.device) + 0.5) / size
    low, wide = (solids.feet().to(xyr.device)[shape, i, None, None, None] for i in range(2))
    across, below = (axis - x) / radius, (axis[:, None] - y) / radius - low  # from the foot, in radii
    height = -below / FLAT  # of the part of the thing whose shadow falls there
    # a leaning copy of the thing, whose edge softens with the distance
    local = torch.stack([across - LEAN * height, (low - height).expand_as(across - height)], -1)[:, 0]
    distance = solids.signed_distance(shape, local)
    soft = 0.1 + 0.13 * height.clamp(0, 3)
    cast = _rise(-distance / soft, -1, 1) * _rise(height, -0.25, 0.3) * (1 - 0.24 * height.clamp(0, 3))
    # and the dark where it touches the floor
    touch = torch.exp(-(((across - 0.06) / (0.28 + 0.7 * wide)) ** 2) - ((below + 0.02) / 0.13) ** 2)
    left: Tensor = (1 - 0.3 * cast) * (1 - 0.27 * touch)
    return left


def grained(albedo: Tensor, texture: Tensor, names: tuple[str, ...], at: Tensor, edge: Tensor, phase: Tensor) -> Tensor:
    """Colours [rows, 3, 1, 1] with stripes, dots or grain: at [rows, h, w, 2] in radii on the surface, edge: pixels a
    radius, phase [rows, 1, 1] of the grain -> [rows, 3, h, w]."""
    which = texture[:, None, None]
    u, v = at[..., 0], at[..., 1]
    stripe = ((((v + 0.35 * u) / 0.46) % 1 - 0.5).abs() - 0.25) * 0.46 * edge
    row = torch.floor(v / 0.42 + 0.5)
    dot = 0.15 - torch.hypot(v - row * 0.42, (u / 0.48 + 0.5 * (row % 2) + 0.5) % 1 * 0.48 - 0.24)
    dark = torch.where(which == names.index("striped"), stripe, dot * edge)
    dark = (dark + 0.5).clamp(0, 1) * ((which == names.index("striped")) | (which == names.index("dotted")))
    # boards cut along the trunk: rings that are bent, finer lines between them
    bend = u + 0.14 * torch.sin(1.9 * v + 6 * phase) + 0.04 * torch.sin(5.3 * v + 17 * phase)
    ring = (2.3 * bend + 0.22 * torch.sin(3.1 * bend + 9 * phase)) % 1
    rings = ring * (1 - ring**10)  # wood darkens slowly through a year, and ends at once
    lines = 0.5 + 0.5 * torch.sin(46 * bend + 2 * torch.sin(1.3 * v))
    grain = (0.9 * rings + 0.22 * lines) * (which == names.index("wooden"))
    deep = _colour((0.5, 0.6, 0.56), albedo)  # shades of a colour lean to the warm side, else yellow is olive
    return albedo * (1 - dark[:, None] * deep - 0.85 * grain[:, None] * deep)


def lit(fill: Tensor, normal: Tensor, shiny: Tensor, ground: Tensor, height: Tensor) -> Tensor:
    """Colours [rows, 3, h, w] in the light: normals [rows, 3, h, w], shiny [rows], ground [rows, 3], height above the
    floor in radii [rows, 1, h, w]."""
    right, down, out = normal.split(1, 1)
    a, b, c = _unit(LIGHT)
    key = (a * right + b * down + c * out).clamp(min=0)
    sky = 0.5 - 0.5 * down
    close = 1 - 0.3 * torch.exp(-height.clamp(min=0) / 0.22)
    colour = fill * (key * 0.62 * _colour(WARM, fill) + (0.4 + 0.26 * sky) * close * _colour(SHADE, fill))
    colour = colour + fill * ground[:, :, None, None] * (0.22 * down.clamp(min=0) * close)  # what the floor sends back
    # halfway between the light and the eye
    a, b, c = _unit((LIGHT[0], LIGHT[1], LIGHT[2] + math.hypot(*LIGHT)))
    facing = (a * right + b * down + c * out).clamp(min=0)
    glossy = shiny[:, None, None, None]
    spot = _rise(facing, 0.965, 0.99) * 0.62 + 0.2 * facing**24 + 0.22 * (1 - out).clamp(0, 1) ** 3 * sky
    gleam = torch.where(glossy, spot, 0.1 * facing**10)
    seen: Tensor = colour + (1 - colour) * gleam
    return seen


def flat(fill: Tensor, normal: Tensor) -> Tensor:
    """Colours as a cartoon has them: three tones with sharp limits."""
    a, b, c = _unit(LIGHT)
    right, down, out = normal.split(1, 1)
    key = a * right + b * down + c * out
    tone = 0.7 + 0.26 * _rise(key, 0.22, 0.27)
    colour = fill * tone
    return colour + (1 - colour) * 0.36 * _rise(key, 0.955, 0.965)
