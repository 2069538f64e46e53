"""The small world of the bundled model: scenes, their captions and their pictures.

A scene is one to four things (shape, colour, texture, place, size) on a plain background. `describe` says it in words
with varied order and left-out details; `paint` draws batches of scenes from signed distance tables on any device, so
that the trainer renders on the GPU and the demo's pictures come from the same code.

One shape-colour pair in eight is held out (`held_out`): the bundled model never saw it in any picture or caption.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

SIZE = 128  # pixels, the side the bundled model was trained at

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = {
    "red": (222, 38, 38),
    "orange": (246, 138, 20),
    "yellow": (240, 214, 24),
    "green": (36, 150, 52),
    "teal": (16, 164, 172),
    "blue": (40, 72, 224),
    "purple": (126, 44, 168),
    "pink": (246, 96, 172),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "grey": (182, 182, 182),
    "cream": (250, 232, 188),
    "mint": (186, 240, 208),
    "sky": (178, 218, 250),
    "lavender": (214, 198, 250),
}
TEXTURES = ("plain", "striped", "dotted")
COUNTS = {2: "two", 3: "three", 4: "four"}
PLACES = {
    "at the top left": (0.3, 0.3),
    "at the top": (0.5, 0.3),
    "at the top right": (0.7, 0.3),
    "on the left": (0.3, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.7, 0.5),
    "at the bottom left": (0.3, 0.7),
    "at the bottom": (0.5, 0.7),
    "at the bottom right": (0.7, 0.7),
}
SIZES = {"small": 0.16, "large": 0.245}
LAYOUTS = {
    2: ((0.25, 0.5), (0.75, 0.5)),
    3: ((0.5, 0.27), (0.27, 0.72), (0.73, 0.72)),
    4: ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
}
LINE = 0.022  # half width of an outline, of the picture's side
STYLES = ("plain", "neon", "inked")
INK = (0.07, 0.07, 0.1)
TABLE, REACH = 256, 1.6  # distance tables: pixels a side, and how far from the centre they reach in units of the radius


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` (centre) and `r` (radius) are fractions of the picture's side."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `kind` is single, count, beside or above; `place` and `size` name a single thing's."""

    kind: str
    things: tuple[Thing, ...]
    background: str
    place: str = ""
    size: str = ""


def held_out(shape: str, colour: str) -> bool:
    """Whether the bundled model never saw this pair: one shape a colour, 8 of 64."""
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour)) % len(SHAPES) == 0


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def sample_scene(rng: random.Random, held: bool = False, pairs: float = 4 / 11) -> Scene:
    """A random scene; `held` decides whether its first thing is a held-out pair (all others never are).

    pairs: share of scenes with two different things, of which binding is the hardest to learn.
    """

    def thing(x: float, y: float, r: float, pair_held: bool = False) -> Thing:
        while True:
            shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            if held_out(shape, colour) == pair_held:
                break
        texture = rng.choice(("plain", "plain", *TEXTURES))
        jitter = 0.02
        return Thing(
            shape,
            colour,
            texture,
            x + rng.uniform(-jitter, jitter),
            y + rng.uniform(-jitter, jitter),
            r * rng.uniform(0.93, 1.07),
        )

    kind = rng.choices(
        ("single", "count", "beside", "above"), weights=(4 / 7 * (1 - pairs), 3 / 7 * (1 - pairs), pairs / 2, pairs / 2)
    )[0]
    background = rng.choice(list(BACKGROUNDS))
    if kind == "single":
        place, size = rng.choice(list(PLACES)), rng.choice(list(SIZES))
        return Scene(kind, (thing(*PLACES[place], SIZES[size], held),), background, place, size)
    if kind == "count":
        places = LAYOUTS[rng.choice(list(COUNTS))]
        first = thing(*places[0], 0.17, held)
        return Scene(kind, tuple(replace(first, x=x, y=y) for x, y in places), background)
    ends = LAYOUTS[2] if kind == "beside" else tuple((y, x) for x, y in LAYOUTS[2])
    first = thing(*ends[0], 0.19, held)
    second = thing(*ends[1], 0.19)
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = thing(*ends[1], 0.19)
    return Scene(kind, (first, second), background)


def describe(scene: Scene, rng: random.Random | None = None) -> str:
    """Scene -> caption. With `rng`, details are left out and the order varies; without, everything is said."""

    def keep(share: float) -> bool:
        return rng is None or rng.random() < share

    def noun(thing: Thing, many: bool = False) -> str:
        words = [thing.colour, plural(thing.shape) if many else thing.shape]
        if thing.texture != "plain":
            words.insert(0, thing.texture)
        return " ".join(words)

    first = scene.things[0]
    if scene.kind == "single":
        size = f"{scene.size} " if keep(0.6) else ""
        place = f" {scene.place}" if keep(0.75) else ""
        text = f"a {size}{noun(first)}{place}"
    elif scene.kind == "count":
        text = f"{COUNTS[len(scene.things)]} {noun(first, many=True)}"
    else:
        a, b = noun(first), noun(scene.things[1])
        if scene.kind == "beside":
            text = f"a {a} to the left of a {b}" if keep(0.5) else f"a {b} to the right of a {a}"
        else:
            text = f"a {a} above a {b}" if keep(0.5) else f"a {b} below a {a}"
    if keep(0.85):
        ground = f"on a {scene.background} background"
        text = f"{text} {ground}" if keep(0.8) else f"{ground}, {text}"
    if not keep(0.9):
        text = f"a picture of {text}"
    return text


def _polygon(points: Sequence[tuple[float, float]], grid: Tensor) -> Tensor:
    """Signed distance to a closed polygon, negative inside. grid [n, n, 2] -> [n, n]."""
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
    return torch.where(inside, -distance, distance)


@cache
def distance_tables() -> Tensor:
    """Signed distances of every shape at radius 1, [shapes, TABLE, TABLE] over [-REACH, REACH], y down."""
    axis = torch.linspace(-REACH, REACH, TABLE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1)
    turn = torch.pi * 2

    def around(count: int, radii: Sequence[float]) -> list[tuple[float, float]]:
        corners = []
        for i in range(count):
            angle, radius = torch.tensor(turn * i / count), radii[i % len(radii)]
            corners.append((float(radius * angle.sin()), float(-radius * angle.cos())))
        return corners

    t = torch.linspace(0, turn, 200, dtype=torch.float64)[:-1]
    heart_x = 16 * t.sin() ** 3
    heart_y = -(13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos())
    heart = list(zip((heart_x / 16.5).tolist(), (heart_y / 16.5 - 0.08).tolist(), strict=True))
    a, b = 0.34, 0.98
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    tables = {
        "circle": grid.norm(dim=-1) - 0.95,
        "square": _polygon([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)], grid),
        "triangle": _polygon([(x, y + 0.2) for x, y in around(3, (1.15,))], grid),
        "star": _polygon([(x, y + 0.06) for x, y in around(10, (1.12, 0.46))], grid),
        "heart": _polygon(heart, grid),
        "cross": _polygon(cross, grid),
        "ring": (grid.norm(dim=-1) - 0.72).abs() - 0.25,
        "diamond": _polygon(around(4, (1.12, 0.78)), grid),
    }
    return torch.stack([tables[name] for name in SHAPES]).float()


def signed_distance(shape: Tensor, local: Tensor) -> Tensor:
    """Distance to edges in units of the radius: shape [batch], local [batch, h, w, 2] -> [batch, 1, h, w]."""
    tables = distance_tables().to(local.device)
    inner = torch.nn.functional.grid_sample(
        tables[shape, None], local / REACH, padding_mode="border", align_corners=True
    )
    return inner + (local.abs().amax(-1) - REACH).clamp(min=0)[:, None]


@dataclass
class Canvas:
    """A batch of scenes as tensors on one device, K things each (shape -1: none)."""

    shape: Tensor  # [batch, K] index into SHAPES or -1
    rgb: Tensor  # [batch, K, 3] in [0, 1]
    texture: Tensor  # [batch, K] index into TEXTURES
    xyr: Tensor  # [batch, K, 3] fractions of the side
    ground: Tensor  # [batch, 3] in [0, 1]
    style: Tensor  # [batch] index into STYLES


def canvas(scenes: Sequence[Scene], style: str = "plain", device: torch.device | str = "cpu") -> Canvas:
    """Scenes -> tensors for `paint`."""
    count, most = len(scenes), max(len(scene.things) for scene in scenes)
    colours, textures = list(COLOURS), list(TEXTURES)
    rows_shape, rows_colour, rows_texture, rows_xyr = [], [], [], []
    for scene in scenes:
        spare = most - len(scene.things)
        rows_shape.append([SHAPES.index(t.shape) for t in scene.things] + [-1] * spare)
        rows_colour.append([colours.index(t.colour) for t in scene.things] + [0] * spare)
        rows_texture.append([textures.index(t.texture) for t in scene.things] + [0] * spare)
        rows_xyr.append([(t.x, t.y, t.r) for t in scene.things] + [(0.5, 0.5, 0.1)] * spare)
    palette = torch.tensor(list(COLOURS.values())) / 255
    grounds = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) / 255
    return Canvas(
        shape=torch.tensor(rows_shape).to(device),
        rgb=palette[torch.tensor(rows_colour)].to(device),
        texture=torch.tensor(rows_texture).to(device),
        xyr=torch.tensor(rows_xyr).to(device),
        ground=grounds.to(device),
        style=torch.full((count,), STYLES.index(style), device=device),
    )


def paint(batch: Canvas, size: int = SIZE) -> Tensor:
    """Canvas -> pictures [batch, 3, size, size] in [0, 1].

    Neon pictures show things as glowing outlines on a dark ground, inked ones with a black line around every edge. The
    bundled model's transformer saw neither; inked is the style that the demo's adapter learns.
    """
    device = batch.xyr.device
    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    neon, inked = ((batch.style == STYLES.index(name))[:, None, None, None] for name in ("neon", "inked"))
    ground = torch.where(neon[:, :, 0, 0], batch.ground * 0.16, batch.ground)
    picture = ground[:, :, None, None].expand(-1, -1, size, size)
    for k in range(batch.shape.shape[1]):
        centre_x, centre_y, radius = (batch.xyr[:, k, i, None, None] for i in range(3))
        local = torch.stack([(x - centre_x) / radius, (y - centre_y) / radius], -1)  # [batch, size, size, 2]
        pixels = signed_distance(batch.shape[:, k].clamp(min=0), local) * radius[:, None] * size
        present = (batch.shape[:, k] >= 0)[:, None, None, None]
        colour = batch.rgb[:, k, :, None, None]

        slope = radius[:, None] * size
        stripe = ((local[..., 1][:, None] / 0.5 % 1 - 0.5).abs() - 0.25) * 0.5 * slope
        cell = (local / 0.56 + 0.5) % 1 - 0.5
        dot = (0.17 - cell.norm(dim=-1)[:, None] * 0.56) * slope
        texture = batch.texture[:, k, None, None, None]
        dark = torch.where(texture == 1, stripe, torch.where(texture == 2, dot, torch.full_like(dot, -1)))
        fill = colour * (1 - 0.62 * (dark + 0.5).clamp(0, 1))
        alpha = (0.5 - pixels).clamp(0, 1)
        filled = picture * (1 - alpha) + fill * alpha

        bright = colour * 0.85 + 0.15
        line = (LINE * size + 0.5 - pixels.abs()).clamp(0, 1)
        glow = 0.35 * torch.exp(-pixels.abs() / (0.05 * size))
        outlined = (picture + bright * glow) * (1 - line) + bright * line
        traced = filled * (1 - line) + torch.tensor(INK, device=device)[:, None, None] * line
        drawn = torch.where(neon, outlined, torch.where(inked, traced, filled))
        picture = torch.where(present, drawn, picture)
    return picture.clamp(0, 1)
