"""What others ask of a run, how a start of it is recorded, and its losses by picture."""

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infer.program.errors import STOPPED
from train.loop.picture_losses import FIRST, PictureLosses
from train.state import requests as asked
from train.state.latest import NAME, recorded
from train.state.requests import FOLDER, ask, heard
from train.state.signals import StopSignals


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_reach_a_run_once_and_stop_is_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "EVERY", 0.02)
    ask(tmp_path, "save")  # before the run began: it is old
    with StopSignals() as stop, heard(tmp_path, stop) as requests:
        stop.defer()
        assert not requests.pop("save") and not (tmp_path / FOLDER / "save").exists()
        ask(tmp_path, "sample")
        wait_for(lambda: "sample" in requests.asked)
        assert requests.pop("sample") and not requests.pop("sample") and not stop.requested()
        ask(tmp_path, "stop")
        wait_for(stop.requested)
        assert stop.reason == "SIGTERM"
        ask(tmp_path, "stop")  # a second signal would end this process at once
        wait_for(lambda: not (tmp_path / FOLDER / "stop").exists())
        time.sleep(0.05)
    with pytest.raises(ValueError, match="ask for one of save, sample, stop"):
        ask(tmp_path, "../stop")


def test_a_start_is_recorded_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "run=mine", "data.prefix=nobody-sees-it"])
    monkeypatch.setenv("SOME_TOKEN", "nobody-sees-it")

    def latest() -> tuple[str, str | None]:
        said = json.loads((tmp_path / NAME).read_text())
        assert said["words"] == ["run=mine", "data.prefix=<SOME_TOKEN>"]
        return said["state"], said["reason"]

    with recorded(tmp_path, 1, lambda: None):
        assert latest() == ("running", None)
    assert latest() == ("done", None)
    with recorded(tmp_path, 1, lambda: "SIGTERM"):
        pass
    assert latest() == ("stopped", "SIGTERM")
    with pytest.raises(SystemExit), recorded(tmp_path, 1, lambda: "SIGINT"):
        raise SystemExit(STOPPED)
    assert latest() == ("stopped", "SIGINT")
    with pytest.raises(RuntimeError), recorded(tmp_path, 1, lambda: None):
        raise RuntimeError("x")
    assert latest() == ("failed", "a defect: RuntimeError: x")
    (tmp_path / NAME).unlink()


def test_pictures_that_stand_out_and_that_are_learned_are_told_apart(tmp_path: Path) -> None:
    """Losses of one formula: level x picture x time; each factor is found again, whatever the other two do."""
    rng, losses = random.Random(0), PictureLosses(tmp_path / "pictures.json", False)
    hard, learned = "hard.png", "learned.png"
    names = [f"{i}.png" for i in range(20)] + [hard, learned]
    for visit in range(200):
        for name in names:
            sigma = rng.random()
            loss = math.exp(2 * sigma) * (3 if name == hard else 1)
            if name == learned:
                loss *= 0.2 if visit > 20 else 1
            losses.note([name], [sigma], [loss])
    losses.write(200)
    said = json.loads((tmp_path / "pictures.json").read_text())["pictures"]
    usual = sorted(said[name][1] for name in names[:20])[10]
    assert said[hard][0] == 200 and said[hard][1] / usual == pytest.approx(3, rel=0.25)
    assert said[learned][2] / said[names[0]][2] == pytest.approx(0.2, rel=0.3)
    again = PictureLosses(tmp_path / "pictures.json", True)
    assert again.levels == losses.levels and again.levels[0][0] > FIRST
    (tmp_path / "pictures.json").write_text('{"pictures": {"a": [1]}')
    assert PictureLosses(tmp_path / "pictures.json", True).pictures == {}
