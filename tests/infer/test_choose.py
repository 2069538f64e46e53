"""The choice among a run's checkpoints, of klein: what is drawn is what the run's previews show."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.choose import choose
from infer.choosing.settings import Choose
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
                precision=Precision("fp32"), adapter=Adapter(rank=4), optim=Optim(lr=0.1, warmup=0),
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


def test_a_model_that_is_gone_is_said_before_anything_is_loaded() -> None:
    shutil.copytree("runs/mine", "runs/moved")
    config = yaml.safe_load(Path("runs/moved/config.yaml").read_text())
    config["model"]["path"] = "gone"
    Path("runs/moved/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"model\.path 'gone' is no folder here and no Hub id"):
        choose(mine(run="moved"))
