"""The choice among a run's checkpoints, of klein: what is drawn is what the run's previews show."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from infer.adapter.lora import Adapter
from infer.adapter.read import read_pairs
from infer.adapter.selection import Trained
from infer.checkpoint.model import Model
from infer.choose import choose
from infer.choosing.run import read_run
from infer.choosing.settings import Choose
from infer.draw import draw
from infer.drawing import loaded
from infer.drawing.settings import Draw
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling
from infer.sample.sheet import Layout
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.loop.preview import SHEET
from train.objective.optim import Optim
from train.run.config import Train
from train.train import train

SIDE = 32


@pytest.fixture(scope="module")
def home(klein: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has kept two checkpoints; its prompt is longer than its texts."""
    folder = tmp_path_factory.mktemp("choose")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_style(Path("pictures"), 4, 0)
        train(
            Train(
                model=klein, data=Data(path="pictures", resolution=SIDE, text_length=16, validation=0.25), steps=2,
                validate_every=1, validation_levels=1, save_every=1, keep=2, preview_every=2, previews=["a fox " * 20],
                device="cpu", run="mine", sampling=Sampling(steps=1, height=SIDE, width=SIDE),
                precision=Precision("fp32"), adapter=Adapter(rank=4), optim=Optim(lr=0.1, warmup=0), ema=0.5,
            )
        )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def mine(**changes: object) -> Choose:
    sampling = Sampling(steps=1, height=SIDE, width=SIDE)
    return replace(Choose("mine", weights=[0.5], unrelated=["a car"], sampling=sampling, device="cpu"), **changes)


def test_the_grid_reads_prompts_as_the_run_did(capsys: pytest.CaptureFixture[str]) -> None:
    choose(mine())
    said = json.loads(Path("runs/mine/choose/choice.json").read_text())
    assert [entry["step"] for entry in said["entries"]] == [1, 2] and said["best"]["weight"] == 0.5
    with Image.open(sorted(Path("runs/mine/previews").glob("step-*.png"))[-1]) as board:
        drawn = json.loads(board.text[SHEET])  # type: ignore[attr-defined]
        cell = board.crop(Layout(drawn["prompts"], drawn["columns"], tuple(drawn["size"])).cell(0, 0))
    shown = np.asarray(cell.resize((SIDE, SIDE), Image.Resampling.NEAREST), dtype=np.float64)
    base = np.asarray(Image.open(Path("runs/mine/choose") / said["base"][0]), dtype=np.float64)
    assert np.abs(shown - base).mean() < 0.01
    assert f"best: {said['best']['name']} at 0.5, " in capsys.readouterr().out

    choose(Choose("mine", take="best"))
    taken = json.loads(Path("runs/mine/chosen/choice.json").read_text())
    assert taken["name"] == said["best"]["name"] and taken["reason"].endswith("use it with adapter.weight=0.5")


def losses(name: str) -> list[float]:
    lines = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line and line["step"] > 0]


def test_what_the_run_ships_is_drawn_judged_and_taken() -> None:
    """Its averaged weights: against drawings with the adapters that the run has written itself at its end."""
    shipped = Draw(
        Model(yaml.safe_load(Path("runs/mine/config.yaml").read_text())["model"]["path"]), Precision("fp32"),
        prompts=["a fox"], adapters=["runs/mine/adapter-ema", "runs/mine/checkpoints/step-000002/ema.safetensors",
        "runs/mine/adapter", "runs/mine/checkpoints/step-000002"], weights=[0.5], text_length=16, device="cpu",
        sampling=Sampling(steps=1, height=SIDE, width=SIDE),
    )  # fmt: skip
    pictures = [np.asarray(Image.open(file)) for file in draw(shipped)[:-1]]
    assert (pictures[0] == pictures[1]).all() and (pictures[2] == pictures[3]).all()
    assert not (pictures[0] == pictures[2]).all()
    for average, picture, name in ((None, pictures[0], "validation_loss_ema"), (False, pictures[2], "validation_loss")):
        choose(mine(average=average, prompts=["a fox"]))
        said = json.loads(Path("runs/mine/choose/choice.json").read_text())
        assert said["average"] is (average is None)
        assert [entry["validation"] for entry in said["entries"]] == losses(name)
        shown = np.asarray(Image.open(Path("runs/mine/choose") / said["entries"][1]["images"][0]))
        assert (shown == picture).all()
        with pytest.raises(ValueError, match="but the last choice drew the others; choose again with average"):
            choose(Choose("mine", take="best", average=not said["average"]))
        choose(Choose("mine", take="best"))  # what was drawn, though nobody says which
        taken = json.loads(Path("runs/mine/chosen/choice.json").read_text())
        assert taken["average"] == said["average"] and taken["name"] == said["best"]["name"]
        file = "ema.safetensors" if said["average"] else "adapter.safetensors"
        state = load_file(Path("runs/mine/checkpoints") / taken["name"] / file)
        for layer, pair in read_pairs("runs/mine/chosen").items():  # alpha / rank is 16 / 4
            expected = 4 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            torch.testing.assert_close(pair.strength * pair.up @ pair.down, expected)


def test_averages_that_are_not_there_and_damaged_checkpoints() -> None:
    shutil.copytree("runs/mine", "runs/damaged")
    checkpoints = Path("runs/damaged/checkpoints")
    (checkpoints / "step-000001" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"average is true, but checkpoint step-000001 .* has no averaged weights"):
        choose(mine(run="damaged", average=True))
    assert not read_run(Path("runs/damaged"), [], None).average
    file = checkpoints / "step-000002" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"checkpoint .*step-000002 is damaged \(its checksum differs"):
        read_pairs(str(checkpoints / "step-000002"))
    Path("runs/damaged/config.yaml").unlink()
    with pytest.raises(ValueError, match=r"whose strength stands in .*config.yaml, which cannot be read"):
        read_pairs(str(checkpoints / "step-000001"))


def test_memory_settings_are_checked_again_with_kind_autos_mixture(
    klein: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of unpacked weights go with NF4, which most layers of kind auto are, and not with what it comes to."""
    monkeypatch.setattr(loaded, "decide", lambda model, precision, device, say: Precision("bf16"))
    auto, memory = Precision("auto", budget_gib=1.0), Memory(unpacked=True, fused=True)
    with pytest.raises(ValueError, match=r"memory.unpacked=true keeps copies of unpacked weights, but none are packed"):
        loaded.settle(klein, auto, [Trained()], memory, torch.device("cpu"))


def test_a_model_that_is_gone_is_said_before_anything_is_loaded() -> None:
    shutil.copytree("runs/mine", "runs/moved")
    config = yaml.safe_load(Path("runs/moved/config.yaml").read_text())
    config["model"]["path"] = "gone"
    Path("runs/moved/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"model\.path 'gone' is no folder here and no Hub id"):
        choose(mine(run="moved"))
