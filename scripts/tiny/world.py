"""The small world of the bundled model: scenes, their captions and their pictures.

A scene is one to four solid things (shape, colour, texture, place, size) that stand on a floor before a wall of its
background's colour. `describe` says it in words with varied order and left-out details; `paint` draws batches of scenes
from tables of distances and normals (solids.py) in one light (light.py) on any device, so that the trainer renders on
the GPU and the demo's pictures come from the same code.

One shape-colour pair in eight is held out (`held_out`): the bundled model never saw it in any picture or caption.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scripts.tiny import light, solids
from scripts.tiny.solids import SHAPES as SHAPES  # a world is asked for its shapes

SIZE = 192  # pixels, the side the bundled model was trained at

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
TEXTURES = ("plain", "striped", "dotted", "shiny", "wooden")
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
SIZES = {"small": 0.16, "large": 0.235}
LAYOUTS = {
    2: ((0.25, 0.5), (0.75, 0.5)),
    3: ((0.5, 0.27), (0.27, 0.72), (0.73, 0.72)),
    4: ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
}
LINE = 0.016  # half width of an outline, of the picture's side
STYLES = ("plain", "neon", "inked")
INK = (0.07, 0.07, 0.1)


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
    count, most = len(scenes), max(1, *(len(scene.things) for scene in scenes))
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

    Neon pictures show things as glowing outlines in a dark room, inked ones as a cartoon does, with few tones and a
    black line around every edge. The bundled model's transformer saw neither; inked is the style that the demo's
    adapter learns.
    """
    device = batch.xyr.device
    axis = (torch.arange(size, device=device) + 0.5) / size
    neon, inked = (batch.style == STYLES.index(name) for name in ("neon", "inked"))
    some_neon, some_inked = torch.stack([neon.any(), inked.any()]).tolist()
    picture = light.room(batch.ground, size)
    present = [(batch.shape[:, k] >= 0).nonzero()[:, 0] for k in range(batch.shape.shape[1])]
    for k, rows in enumerate(present):
        if len(rows):
            picture[rows] *= light.shadow(batch.shape[rows, k], batch.xyr[rows, k], size)
    if some_neon:
        picture = torch.where(neon[:, None, None, None], picture * 0.16, picture)
    for k, rows in enumerate(present):
        if not len(rows):
            continue
        shape, texture, xyr = batch.shape[rows, k], batch.texture[rows, k], batch.xyr[rows, k]
        x, y, radius = (xyr[:, i, None, None] for i in range(3))
        local = torch.stack(
            [((axis - x) / radius).expand(-1, size, -1), ((axis[:, None] - y) / radius).expand(-1, -1, size)], -1
        )
        edges = radius[:, None] * size  # pixels a radius
        pixels, normal = light.surface(shape, local)
        pixels = pixels * edges
        colour = batch.rgb[rows, k, :, None, None]
        # a pattern is bent around the thing
        fill = light.grained(
            colour, texture, TEXTURES, local + 0.22 * normal[:, :2].permute(0, 2, 3, 1), edges[:, 0], x * 5 + y * 7
        )
        behind, drawn = picture[rows], pixels.abs()
        height = solids.feet().to(device)[shape, 0, None, None, None] - local[..., 1][:, None]
        solid = light.lit(fill, normal, texture == TEXTURES.index("shiny"), batch.ground[rows], height)
        alpha = (0.5 - pixels).clamp(0, 1)
        filled = behind + (solid - behind) * alpha
        line = (LINE * size + 0.5 - drawn).clamp(0, 1)
        if some_inked:
            traced = behind + (light.flat(fill, normal) - behind) * alpha
            traced = traced + (torch.tensor(INK, device=device)[:, None, None] - traced) * line
            filled = torch.where(inked[rows][:, None, None, None], traced, filled)
        if some_neon:
            bright = colour * 0.85 + 0.15
            glow = behind + bright * (0.35 * torch.exp(-drawn / (0.05 * size)))
            filled = torch.where(neon[rows][:, None, None, None], glow + (bright - glow) * line, filled)
        picture[rows] = filled
    return picture.clamp(0, 1)
