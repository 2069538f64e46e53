"""Prompts with references in a comparison: what is drawn, its scores against figures worked out by hand, the report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer.adapter.read import Pair
from infer.adapter.selection import Trained
from infer.adapter.write import write_pairs
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.draw import draw
from infer.drawing.settings import Draw
from infer.quantize.precision import Precision
from infer.report.results import read_results
from infer.sample.edit import Edit
from infer.sample.generate import Sampling
from infer.score.edits import check_scored, fitted

SIZE = (48, 32)  # width, height
SMALL = Sampling(steps=1, height=32, width=48)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (("before", (96, 64)), ("other", (96, 64)), ("square", (64, 64))):
        small = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(f"{name}.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[8:24, :24] = 255
    Image.fromarray(mask).save("mask.png")


def pixels(file: Path | str) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS), dtype=np.float64)


def test_edits_are_drawn_scored_and_shown_beside_their_references(klein: Model) -> None:
    edits = [
        Edit("make it red", ["before.png"], "mask.png", "other.png"),
        Edit("make it red", ["other.png", "square.png"]),
    ]
    options = Compare(
        model=klein, precisions={"nf4": Precision("nf4")}, prompts=["a fox"], edits=edits,
        sampling=SMALL, text_length=32, device="cpu", run="mine", reference_resolution=64,
    )  # fmt: skip
    folder = compare(options)
    found = read_results(folder / "results.json")
    assert [row.references for row in found.rows[:3]] == [
        None, ["images/reference-001-0.png"], ["images/reference-002-0.png", "images/reference-002-1.png"]
    ]  # fmt: skip
    assert len({pixels(folder / row.image).tobytes() for row in found.rows}) == 3  # one prompt, other references
    weights = np.zeros((32, 48, 1))
    weights[8:24, :24] = 1
    for row in found.rows:
        drawn = pixels(folder / row.image)
        named = {name for name in row.scores if name.startswith(("kept", "changed", "target"))}
        if row.references != ["images/reference-001-0.png"]:
            assert not named
            continue
        assert named == {"kept_psnr", "changed", "target_psnr", "target_ssim"}
        before, target = pixels("before.png"), pixels("other.png")
        outside = np.mean(((drawn - before) ** 2)[weights[..., 0] == 0])
        assert row.scores["kept_psnr"] == pytest.approx(20 * math.log10(255) - 10 * math.log10(outside), rel=1e-6)
        within = np.mean(((drawn - before) ** 2)[weights[..., 0] == 1]) ** 0.5 / 255
        assert row.scores["changed"] == pytest.approx(within, rel=1e-6)
        wanted = 20 * math.log10(255) - 10 * math.log10(np.mean((drawn - target) ** 2))
        assert row.scores["target_psnr"] == pytest.approx(wanted, rel=1e-4)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.count('data-name="reference 1"') == 2 and page.count('data-name="reference 2"') == 1
    assert "what should not have changed" in page and "images/reference-002-1.png" in text

    # the command for pictures draws the same, and again from the picture's own record
    alone = Draw(
        klein, Precision("nf4"), edits=edits[1:], sampling=SMALL, text_length=32, device="cpu", reference_resolution=64
    )
    (file,) = draw(alone)
    assert (pixels(file) == pixels(folder / found.rows[-1].image)).all()
    with Image.open(file) as opened:
        said = json.loads(opened.text["flux_lora_draw"])  # type: ignore[attr-defined]
    assert said["settings"]["edits"][0]["references"] == ["other.png", "square.png"]
    assert said["references"].keys() == {"other.png", "square.png"}


def test_an_edit_with_the_words_of_an_unrelated_prompt_stays_an_edit(klein: Model) -> None:
    wide = linear_shapes(read_config(klein, "transformer"))["x_embedder"].rows
    pairs = {"transformer_blocks.0.attn.to_q": Pair(torch.ones(1, wide), torch.ones(wide, 1), 1.0)}
    options = Compare(
        model=klein, precisions={"fp32": Precision("fp32")}, prompts=["a fox"], edits=[Edit("a car", ["before.png"])],
        unrelated=["a car"], sampling=SMALL, text_length=32, device="cpu", run="mine",
        adapter=Trained(str(write_pairs(pairs, "diffusers", Path("a.safetensors"), {}))),
    )  # fmt: skip
    found = read_results(compare(options) / "results.json")
    assert [row.prompt for row in found.rows if row.adapter] == ["a fox", "a car"]
    assert [row.references for row in found.drift or ()] == [None, None]


def test_what_cannot_be_is_refused(klein: Model, tiny: Model) -> None:
    edit = Edit("make it red", ["before.png"])
    with pytest.raises(ValueError, match=r"edits gives references, but .* was not trained with reference pictures"):
        draw(Draw(tiny, edits=[edit], device="cpu"))
    with pytest.raises(ValueError, match=r"edits: mask is mask\.png, which has no effect: infer/compare\.py alone"):
        draw(Draw(klein, edits=[Edit("a", ["before.png"], "mask.png")], device="cpu"))
    with pytest.raises(ValueError, match="reference_resolution is 64, which has no effect: edits gives no references"):
        Draw(klein, prompt="a", reference_resolution=64)
    with pytest.raises(ValueError, match="reference_resolution is 40; FLUX packs multiples of 16"):
        Draw(klein, edits=[edit], reference_resolution=40)
    with pytest.raises(ValueError, match="edits has 'a' without references"):
        Edit("a")
    with pytest.raises(ValueError, match=r"edits has 'make it red' with before\.png twice"):
        Draw(klein, edits=[edit, Edit("make it red", ["before.png"])])
    with pytest.raises(ValueError, match=r"the target square\.png is 64x64, and the pictures are drawn at 48x32"):
        check_scored([Edit("a", ["before.png"], target="square.png")], SIZE)
    Image.new("L", SIZE).save("black.png")
    with pytest.raises(ValueError, match=r"the mask black\.png is black all over"):
        check_scored([Edit("a", ["before.png"], "black.png")], SIZE)


def test_a_reference_of_another_shape_is_shown_whole() -> None:
    shown = np.asarray(fitted(Image.new("RGB", (64, 64), "red"), SIZE))
    assert shown.shape == (32, 48, 3)
    assert (shown[:, 8:40] == (255, 0, 0)).all() and (shown[:, :8] == 255).all() and (shown[:, 40:] == 255).all()
