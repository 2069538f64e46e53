"""The shapes of the small world as solids: distances to their edges, and the normals of their puffed surfaces.

A shape's surface is a membrane over it that a pressure blows up (the Poisson equation, its root as the height): over a
circle that is a ball. Distances and normals are tables at radius 1, looked up for every pixel.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
TABLE, REACH = 256, 1.6  # tables: pixels a side, and how far from the centre they reach in units of the radius
ROUND = 0.07  # radius of the corners of those shapes that have some


def _polygon(points: Sequence[tuple[float, float]], grid: Tensor) -> Tensor:
    """Signed distance to a closed polygon with rounded corners, negative inside. grid [n, n, 2] -> [n, n]."""
    vertices = torch.tensor(points, dtype=grid.dtype)
    distance = torch.full(grid.shape[:2], torch.inf, dtype=grid.dtype)
    inside = torch.zeros(grid.shape[:2], dtype=torch.bool)
    for a, b in zip(vertices, vertices.roll(-1, 0), strict=True):
        edge, offset = b - a, grid - a
        along = ((offset * edge).sum(-1) / (edge * edge).sum()).clamp(0, 1)
        distance = torch.minimum(distance, (offset - along[..., None] * edge).norm(dim=-1))
        crosses = (a[1] > grid[..., 1]) != (b[1] > grid[..., 1])
        run = (b[0] - a[0]) * (grid[..., 1] - a[1]) / (b[1] - a[1] if b[1] != a[1] else 1.0) + a[0]
        inside ^= crosses & (grid[..., 0] < run)
    return torch.where(inside, -distance, distance) - ROUND


def _grid() -> Tensor:
    axis = torch.linspace(-REACH, REACH, TABLE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1)


@cache
def distance_tables() -> Tensor:
    """Signed distances of every shape at radius 1, [shapes, TABLE, TABLE] over [-REACH, REACH], y down."""
    grid, turn = _grid(), torch.pi * 2

    def around(count: int, radii: Sequence[float], lower: float = 0.0) -> list[tuple[float, float]]:
        corners = []
        for i in range(count):
            angle, radius = torch.tensor(turn * i / count), radii[i % len(radii)]
            corners.append((float(radius * angle.sin()), float(lower - radius * angle.cos())))
        return corners

    # two lobes and the tangents from them to the tip; the right half from the notch on, then its mirror image
    lobe, aside, above, tip = 0.47, 0.41, -0.3, 0.86
    leave = math.acos(lobe / math.hypot(aside, tip - above)) - math.atan2(aside, tip - above)
    arc = torch.linspace(math.acos(aside / lobe) - torch.pi, torch.pi / 2 - leave, 60, dtype=torch.float64)
    right = list(zip((aside + lobe * arc.cos()).tolist(), (above + lobe * arc.sin()).tolist(), strict=True))
    heart = [*right, (0.0, tip), *((-x, y) for x, y in reversed(right[1:]))]
    s, a, b = 0.84 - ROUND, 0.36 - ROUND, 0.98 - ROUND
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    tables = {
        "circle": grid.norm(dim=-1) - 0.95,
        "square": _polygon([(-s, -s), (s, -s), (s, s), (-s, s)], grid),
        "triangle": _polygon(around(3, (1.08,), 0.2), grid),
        "star": _polygon(around(10, (1.03, 0.46), 0.06), grid),
        "heart": _polygon(heart, grid),
        "cross": _polygon(cross, grid),
        "ring": (grid.norm(dim=-1) - 0.7).abs() - 0.27,
        "diamond": _polygon(around(4, (0.98, 0.68)), grid),
    }
    return torch.stack([tables[name] for name in SHAPES]).float()


def _membrane(inside: np.ndarray, step: float) -> np.ndarray:
    """What solves laplace(u) = -1 inside and is 0 elsewhere, on a grid of this step."""
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    rows, columns = [], []
    for axis, way in ((0, 1), (0, -1), (1, 1), (1, -1)):
        beside = np.roll(number, way, axis)
        both = inside & (beside >= 0)
        rows.append(number[both])
        columns.append(beside[both])
    row, column, count = np.concatenate(rows), np.concatenate(columns), int(inside.sum())
    system = sparse.csc_matrix((np.full(len(row), -1.0), (row, column)), (count, count)) + 4 * sparse.eye(count)
    height = np.zeros(inside.shape)
    height[inside] = spsolve(system.tocsc(), np.full(count, step**2))
    return height


@cache
def normal_tables() -> Tensor:
    """Unit normals (x right, y down, z to the eye) of every shape's surface, float32 [shapes, 3, TABLE, TABLE].

    Beyond an edge they go on as they are at the edge, so that a pixel on it finds no other.
    """
    step = 2 * REACH / (TABLE - 1)
    normals = []
    for table in distance_tables().double().numpy():
        inside = table < 0
        height = _membrane(inside, step)
        slopes = np.stack(np.gradient(height, step))
        near = ndimage.distance_transform_edt(~(table < -2 * step), return_distances=False, return_indices=True)
        down, right = (ndimage.gaussian_filter(slope[tuple(near)], 1.5) for slope in slopes)
        # height = 2 sqrt(u), so the normal is along (-du/dx, -du/dy, sqrt(u))
        normal = np.stack([-right, -down, np.sqrt(height.clip(0))])
        normals.append(normal / np.linalg.norm(normal, axis=0).clip(1e-9))
    return torch.tensor(np.stack(normals)).float()


@cache
def feet() -> Tensor:
    """Where each shape stands, [shapes, 2]: how far below its centre, and half the width that it stands on."""
    axis = torch.linspace(-REACH, REACH, TABLE)
    rows = []
    for table in distance_tables():
        bottom = float(axis[(table < 0).any(1)][-1])
        low = (table < 0)[(axis > bottom - 0.2) & (axis <= bottom)].any(0)
        rows.append((bottom, float(axis[low].abs().max())))
    return torch.tensor(rows)


def looked_up(tables: Tensor, shape: Tensor, local: Tensor) -> Tensor:
    """Tables [shapes, c, TABLE, TABLE], shape [batch], places [batch, h, w, 2] in units of the radius
    -> [batch, c, h, w]; beyond the tables, what is at their border."""
    return torch.nn.functional.grid_sample(tables[shape], local / REACH, padding_mode="border", align_corners=True)


def signed_distance(shape: Tensor, local: Tensor) -> Tensor:
    """Distance to edges in units of the radius: shape [batch], local [batch, h, w, 2] -> [batch, 1, h, w]."""
    inner = looked_up(distance_tables().to(local.device)[:, None], shape, local)
    return inner + (local.abs().amax(-1) - REACH).clamp(min=0)[:, None]
