"""The small world: its reader, its held-out pairs, and whether the bundled model draws what it is told."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer.checkpoint.model import Model
from infer.sample.picture import decode
from scripts.tiny import check, world
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.data.samples import read_samples


@pytest.mark.parametrize("style", ["plain", "inked"])
def test_the_reader_reads_what_was_painted(style: str) -> None:
    shares = check.check_reader(60, style)
    assert shares["right"] >= 0.95
    assert shares["inked"] == (1 if style == "inked" else 0)


def test_the_reader_is_not_easily_pleased() -> None:
    scene = world.Scene("single", (world.Thing("star", "red", "plain", 0.5, 0.5, 0.24),), "sky")
    picture = Image.fromarray((world.paint(world.canvas([scene]))[0].permute(1, 2, 0) * 255).byte().numpy())
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
    tables = world.distance_tables()
    axis = torch.linspace(-world.REACH, world.REACH, world.TABLE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    square = torch.maximum(x.abs(), y.abs()) - 0.84
    inside = square < 0
    torch.testing.assert_close(tables[world.SHAPES.index("square")][inside], square[inside])
    ring = ((x**2 + y**2).sqrt() - 0.72).abs() - 0.25
    torch.testing.assert_close(tables[world.SHAPES.index("ring")], ring)


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
