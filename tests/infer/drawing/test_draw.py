"""Pictures from a command: against the comparison's, read back from their PNGs, and what is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image, PngImagePlugin

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.draw import draw
from infer.drawing.record import KEY, like_arguments, record
from infer.drawing.settings import Draw, check_draw, plan_pictures
from infer.program.literal import literal_arguments
from infer.program.paths import CONFIGS, ROOT
from infer.quantize.precision import Precision
from infer.sample import generate
from infer.sample.generate import Sampling
from infer.sample.sheet import Layout
from tests.forked import Forked

SMALL = Sampling(steps=1, height=64, width=64)
HARD = [
    "a 'cup', \"red\"",
    "${oc.env:HOME} \\${x} \\",
    "\\${x}",
    "\\\\${x}\\",
    "null",
    "[a,b]",
    "1e3",
    "ß, 日本 = {x: y}",
    "a\nb",
    "-m x=1",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def said(file: Path) -> dict[str, Any]:
    with Image.open(file) as picture:
        return json.loads(picture.text[KEY])  # type: ignore[attr-defined, no-any-return]


def made(arguments: list[str]) -> Draw:
    """What the command makes of its command line."""
    ConfigStore.instance().store(name="draw_schema", node=Draw)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = OmegaConf.to_object(compose("draw", literal_arguments(like_arguments(arguments), Draw)))
    assert isinstance(options, Draw)
    return options


def written(options: Draw, file: str = "drawn.png", **change: Any) -> Path:
    """A picture with the record of the first place of `options`."""
    info = PngImagePlugin.PngInfo()
    found = json.loads(record(options, plan_pictures(options)[0], {}, (64, 64), {})) | change
    info.add_itxt(KEY, json.dumps(found))
    Image.new("RGB", (16, 16)).save(file, pnginfo=info)
    return Path(file)


def save_random(model: Model, folder: Path, seed: int = 1) -> str:
    transformer = load_transformer(model, Precision("bf16"), torch.device("cpu"))
    for parameter in attach(transformer, Adapter(rank=4, alpha=9), seed=0):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    save_adapter(transformer, folder, {})
    return str(folder)


def test_strengths_are_the_comparisons_and_a_picture_is_drawn_again(tiny: Model) -> None:
    path = save_random(tiny, Path("lora"))
    options = Draw(
        tiny, Precision("nf4"), Trained(path), [1.0, 0.5, 0.0], "a star", [], [3], SMALL, out="mine", device="cpu"
    )
    files = draw(options)
    assert [file.name for file in files] == ["a-star-3-w1.0.png", "a-star-3-w0.5.png", "a-star-3-w0.0.png", "sheet.png"]
    folder = compare(
        Compare(tiny, {"nf4": Precision("nf4")}, None, Trained(path), {}, ["a star"], [3], SMALL, run="r", device="cpu")
    )
    assert (pixels(files[0]) == pixels(folder / "images" / "nf4-adapter-000-3.png")).all()
    assert (pixels(files[2]) == pixels(folder / "images" / "nf4-000-3.png")).all()
    assert not any((pixels(files[1]) == pixels(file)).all() for file in (files[0], files[2]))
    found = said(files[1])
    assert found["settings"]["adapter.weight"] == 0.5 and found["settings"]["seeds"] == [3]
    assert found["settings"]["sampling.steps"] == 1 and found["settings"]["precision.kind"] == "nf4"
    assert found["adapters"].keys() == {path} and re.fullmatch("[0-9a-f]{64}", found["adapters"][path])
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["seconds"] > 0
    command = [str(ROOT / "infer/draw.py"), f"like={files[1]}", "device=cpu", "out=again"]
    code, words = Forked(command, Path.cwd(), os.environ, Path("words").absolute()).finish(120)
    assert code == 0, words
    assert [file.name for file in Path("again").iterdir()] == ["a-star-3.png"]
    assert (pixels(Path("again/a-star-3.png")) == pixels(files[1])).all()
    save_random(tiny, Path("lora"), seed=2)
    with pytest.raises(ValueError, match=r"was drawn with another adapter than lora is now; give adapter.path=lora"):
        like_arguments([f"like={files[1]}"])
    assert f"adapter.path={path}" in like_arguments([f"like={files[1]}", f"adapter.path={path}"])


def test_flux2_and_the_contact_sheet(klein: Model) -> None:
    options = Draw(klein, prompts=["a cup", "A cup!"], seeds=[0, 7], sampling=SMALL, device="cpu")
    *files, sheet = draw(options)
    names = ["a-cup-0.png", "a-cup-7.png", "a-cup-2-0.png", "a-cup-2-7.png"]
    assert [file.name for file in files] == names
    layout = Layout([one.row for one in plan_pictures(options)], ["base"], (64, 64))
    with Image.open(sheet) as board:
        for row, file in enumerate(files):
            cell = board.crop(layout.cell(row, 0)).resize((64, 64), Image.Resampling.NEAREST)
            assert (np.asarray(cell) == pixels(file)).all()
    assert len({pixels(file).tobytes() for file in files}) == 4
    again = made([f"like={files[0]}", "seeds=[7]", "out=again"])
    assert (again.prompt, again.seeds, again.model, again.precision) == ("a cup", [7], klein, Precision("nf4"))


def test_pictures_that_are_not_finite_are_named(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generate.noise
    monkeypatch.setattr(generate, "noise", lambda seed, *size: real(seed, *size) * (float("nan") if seed == 1 else 1))
    options = Draw(tiny, Precision("bf16"), prompt="a star", seeds=[0, 1, 2], sampling=SMALL, device="cpu")
    with pytest.raises(
        ValueError, match=r"1 of 3 pictures are not finite and were not written: a-star-1.png: .*seed 1"
    ):
        draw(options)
    assert sorted(file.name for file in Path("pictures").iterdir()) == ["a-star-0.png", "a-star-2.png"]


@pytest.mark.parametrize("prompt", HARD)
def test_every_prompt_comes_back_from_a_picture(tiny: Model, prompt: str) -> None:
    precision = Precision(
        "nf4",
        layers={"proj_out": "bf16", r"blocks\.(0|1)\..*\.to_[qk]": "int8"},
        skip_modules=["norm_out"],
        budget_gib=None,
    )
    options = Draw(tiny, precision, prompt=prompt, seeds=[-5], text_length=77, sampling=SMALL)
    again = made([f"like={written(options)}"])
    assert asdict(again) == asdict(replace(options, sampling=Sampling(1, None, 64, 64)))


def test_what_the_command_line_says_wins(tiny: Model) -> None:
    options = Draw(tiny, Precision("int8"), prompt="a cup", seeds=[1], sampling=SMALL)
    file = written(options)
    assert made([f"like={file}", "precision=fp4"]).precision == Precision("fp4")
    assert made([f"like={file}", "model=klein4b"]).model == Model("black-forest-labs/FLUX.2-klein-base-4B")
    decoder = written(replace(options, model=replace(tiny, vae=str(file))), "decoder.png")  # any file serves as a name
    assert made([f"like={decoder}"]).model == replace(tiny, vae=str(file))
    assert made([f"like={decoder}", f"model.path={tiny.path}"]).model == tiny  # the old model's parts go with it
    several = made([f"like={file}", "prompts=[a,b]", "sampling.steps=9"])
    assert several.all_prompts() == ["a", "b"] and several.sampling == replace(SMALL, steps=9)
    assert several.precision == Precision("int8") and several.seeds == [1]
    assert made(["like=null", "prompt=x"]) == made(["prompt=x"])


def test_files_that_say_no_settings(tiny: Model) -> None:
    Image.new("RGB", (16, 16)).save("plain.png")
    Path("text.png").write_text("no picture")
    options = Draw(tiny, prompt="a")
    written(options, "other.png", layout=99)
    written(options, "hostile.png", settings={"out": "/tmp", "prompt": "a"})
    for name, message in (
        ("absent.png", "there is no file 'absent.png'"),
        ("plain.png", "plain.png says nothing of its settings"),
        ("text.png", "text.png cannot be read"),
        ("other.png", "in a form that is not known here"),
        ("hostile.png", "has 'out', which is no setting of a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            like_arguments([f"like={name}"])


def test_names_that_exist_are_refused(tiny: Model) -> None:
    options = Draw(tiny, prompt="A star", seeds=[0, 1], device="cpu")
    Path("pictures-2").mkdir()
    for name in ("a-star-1.png", "sheet.png"):
        file = Path("pictures", name)
        file.parent.mkdir(exist_ok=True)
        file.touch()
        with pytest.raises(ValueError, match=rf"{file} exists; choose another folder, such as out=pictures-3"):
            check_draw(options)
        file.unlink()
    assert check_draw(options).type == "cpu"
    with pytest.raises(ValueError, match=r"like is 'x\.png'; it is read on the command line"):
        check_draw(replace(options, like="x.png"))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("prompt=null", "there is no prompt; give prompt="),
        ("adapter.path=nowhere", "there is no adapter at nowhere"),
        ("model.path=nowhere", "nowhere"),
        ("like=nowhere.png", "there is no file 'nowhere.png'"),
    ],
)
def test_mistakes_are_answered_without_torch(argument: str, message: str) -> None:
    program = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]; "
        "atexit.register(lambda: print('torch' in sys.modules)); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", program, str(ROOT / "infer/draw.py"), "prompt=a", "device=cpu", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stdout.endswith("False\n")
