"""The small world: its reader, its held-out pairs, and whether the bundled model draws what it is told."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from infer.checkpoint.model import Model
from infer.sample.picture import decode
from scripts.tiny import check, solids, world
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.data.samples import read_samples


def picture_of(scene: world.Scene, style: str = "plain", size: int = 192) -> Image.Image:
    pixels = world.paint(world.canvas([scene], style), size)[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


@pytest.mark.parametrize("style", ["plain", "inked"])
def test_the_reader_reads_what_was_painted(style: str) -> None:
    shares = check.check_reader(60, style)
    assert shares["right"] >= 0.98
    assert shares["background"] == 1
    assert shares["inked"] == (1 if style == "inked" else 0)
    assert shares.get("texture", 1) >= 0.95


def blurred(picture: Image.Image) -> Image.Image:
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)
    noisy = soft + np.random.default_rng(0).normal(0, 2.55, soft.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def compressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return Image.open(buffer)


@pytest.mark.parametrize("harm", [blurred, compressed])
@pytest.mark.parametrize("style", ["plain", "inked"])
def test_a_little_blur_noise_or_compression_does_not_mislead_the_reader(
    harm: Callable[[Image.Image], Image.Image], style: str
) -> None:
    rng = random.Random(8)
    scenes = [world.sample_scene(rng) for _ in range(25)]
    seen = [check.read(harm(picture_of(scene, style))) for scene in scenes]
    shares = check.tally(
        [check.compare(check.parse(world.describe(s)), reading) for s, reading in zip(scenes, seen, strict=True)]
    )
    assert shares["right"] >= 0.96
    assert shares["background"] == 1
    assert shares["inked"] == (1 if style == "inked" else 0)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_an_empty_room_is_read_as_its_background_and_holds_nothing(background: str) -> None:
    reading = check.read(picture_of(world.Scene("single", (), background)))
    assert reading.background == background
    assert not reading.things  # the horizon is none


def test_light_comes_from_the_upper_left_and_shadows_fall_to_the_right() -> None:
    ball = world.Scene("single", (world.Thing("circle", "red", "plain", 0.5, 0.5, 0.2),), "white")
    empty = world.Scene("single", (), "white")
    pixels, room = (np.asarray(picture_of(scene), dtype=np.float64).sum(2) for scene in (ball, empty))
    on_ball = pixels[60:132, 60:132]
    upper, lower = (part.sum() for part in (np.triu(on_ball[:, ::-1])[:, ::-1], np.tril(on_ball[:, ::-1])[:, ::-1]))
    assert upper > 1.3 * lower
    left = room - pixels  # the light that is missing on the floor, beside the ball and below its middle
    right, left = left[110:134, 136:176].mean(), left[110:134, 16:56].mean()
    assert right > 40 > 5 > abs(left)


def test_paint_composes_alike_at_any_size_and_in_any_batch() -> None:
    rng = random.Random(6)
    scenes = [world.sample_scene(rng) for _ in range(6)]
    for style in world.STYLES:
        whole = world.paint(world.canvas(scenes, style), 256)
        half = world.paint(world.canvas(scenes, style), 128)
        apart = (torch.nn.functional.avg_pool2d(whole, 2) - half).abs().mean((1, 2, 3))
        assert apart.max() < 0.01, style
        alone = torch.cat([world.paint(world.canvas([scene], style), 128) for scene in scenes])
        torch.testing.assert_close(alone, half, atol=1e-5, rtol=0)
        assert half.min() >= 0 and half.max() <= 1


def test_the_reader_is_not_easily_pleased() -> None:
    scene = world.Scene("single", (world.Thing("star", "red", "plain", 0.5, 0.5, 0.24),), "sky")
    picture = picture_of(scene)
    assert check.right(picture, "a red star on a sky background") == 1
    for wrong in ("a blue star", "a red heart", "two red stars", "a red star above a red star"):
        assert check.right(picture, wrong) == 0
    assert check.inked(picture, "a red star") == 0
    assert check.right(Image.new("RGB", (128, 128), "white"), "a red star") == 0
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    assert check.right(noise, "a red star") == 0
    with pytest.raises(ValueError, match="names nothing of the small world"):
        check.right(picture, "a dog")


def test_captions_say_what_the_scene_holds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = world.sample_scene(rng)
        wanted = check.parse(world.describe(scene, rng))
        assert wanted.pairs == {
            pair: sum((t.shape, t.colour) == pair for t in scene.things)
            for pair in {(t.shape, t.colour) for t in scene.things}
        }


def test_held_out_pairs_are_never_trained_on() -> None:
    pairs = [(shape, colour) for shape in world.SHAPES for colour in world.COLOURS if world.held_out(shape, colour)]
    assert len(pairs) == 8 and len({s for s, _ in pairs}) == 8 and len({c for _, c in pairs}) == 8
    rng = random.Random(1)
    for _ in range(500):
        assert not any(world.held_out(t.shape, t.colour) for t in world.sample_scene(rng).things)
    held = [world.sample_scene(rng, held=True).things[0] for _ in range(100)]
    assert all(world.held_out(thing.shape, thing.colour) for thing in held)


def test_distance_tables_against_analytic_distances() -> None:
    tables = solids.distance_tables()
    axis = torch.linspace(-solids.REACH, solids.REACH, solids.TABLE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    across, down = x.abs() - 0.84 + solids.ROUND, y.abs() - 0.84 + solids.ROUND  # from the corner's centre
    rounded = torch.hypot(across.clamp(min=0), down.clamp(min=0)) + torch.maximum(across, down).clamp(max=0)
    torch.testing.assert_close(tables[world.SHAPES.index("square")], rounded - solids.ROUND)
    ring = ((x**2 + y**2).sqrt() - 0.7).abs() - 0.27
    torch.testing.assert_close(tables[world.SHAPES.index("ring")], ring)


def test_a_circle_is_a_ball_and_every_surface_is_smooth() -> None:
    normals, tables = solids.normal_tables(), solids.distance_tables()
    torch.testing.assert_close(normals.norm(dim=1), torch.ones_like(tables))
    axis = torch.linspace(-solids.REACH, solids.REACH, solids.TABLE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ball = torch.stack([x, y, (0.95**2 - x**2 - y**2).clamp(min=0).sqrt()]) / 0.95
    inner = torch.hypot(x, y) < 0.85
    circle = normals[world.SHAPES.index("circle")]
    assert (circle - ball)[:, inner].abs().max() < 0.03
    # on its edge a surface faces away from the middle of the thing, as the distance grows
    for normal, table in zip(normals, tables, strict=True):
        slope_y, slope_x = torch.gradient(table)
        edge = table.abs() < 0.02
        along = (normal[0] * slope_x + normal[1] * slope_y)[edge] / torch.hypot(slope_x, slope_y)[edge]
        assert along.quantile(0.1) > 0.8


def test_the_style_set_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_style(tmp_path / name, 4, seed=2)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]
    samples, _ = read_samples(Data(str(tmp_path / "a"), 128))
    for sample in samples:
        assert check.inked(decode(sample.read(), sample.name), sample.captions[0]) == 1


def test_the_bundled_model_draws_captions_it_never_saw(tiny: Model) -> None:
    """A quick part of `python scripts/tiny/check.py --count 200`; docs/bundled-model.md holds the whole figure."""
    captions = [c for c in check.held_out_captions(60, seed=7) if " above " not in c and " left of " not in c][:12]
    shares = check.tally(check.check_model(Path(tiny.path), captions, steps=16, guidance=3.5, sheet=None))
    assert shares["right"] >= 0.9
    assert shares["background"] >= 0.9
    assert shares["inked"] == 0
    total = sum(file.stat().st_size for file in Path(tiny.path).rglob("*") if file.is_file())
    assert total < 24 * 2**20
