"""A run's folder that holds what no run wrote: said before anything is loaded, and nothing of it is changed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from infer.checkpoint.model import Model
from train.data.dataset import Data
from train.run.config import Train
from train.train import train

Make = Callable[[Path], object]


def file(name: str, content: bytes = b"mine") -> Make:
    def make(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)

    return make


def folder(name: str) -> Make:
    return lambda place: (place / name / "mine").mkdir(parents=True)


CASES: dict[str, tuple[Make, str]] = {
    "runs is a file": (file("runs"), "runs is a file, and the run's folder would be runs/set/mine"),
    "a folder above": (file("runs/set"), "runs/set is a file, and the run's folder would be"),
    "the run": (file("runs/set/mine"), "runs/set/mine is a file"),
    "a dead link": (lambda place: (place / "runs").symlink_to("gone"), "runs is a link that leads nowhere"),
    "a link to itself": (lambda place: (place / "runs").symlink_to("runs"), "runs is a link that leads nowhere"),
    **{
        f"{name} is a file": (file(f"runs/set/mine/{name}"), f"mine/{name} is a file, where a run has a folder")
        for name in ("adapter", "adapter-ema", "checkpoints", "previews", "requests", "compare")
    },
    **{
        f"{name} is a folder": (folder(f"runs/set/mine/{name}"), f"mine/{name} is a folder, where a run has a file")
        for name in ("config.yaml", "metrics.jsonl", "loss.png", "plan.json", "latest.json", "adapter.sha256", ".lock")
    },
    "another program's config": (file("runs/set/mine/config.yaml", b"model: flux\nlr: 1e-4\n"), "config.yaml is none"),
    "a list": (file("runs/set/mine/config.yaml", b"- processes\n"), "config.yaml is none that a run wrote"),
    "an empty config": (file("runs/set/mine/config.yaml", b""), "config.yaml is none that a run wrote"),
    "bytes": (file("runs/set/mine/config.yaml", b"\xff\xfe\x00"), "config.yaml is none that a run wrote"),
    "no number": (file("runs/set/mine/config.yaml", b"processes: x\nmodel: 1\n"), "config.yaml is none that a run"),
    "a journal": (file("runs/set/mine/metrics.jsonl", b'{"loss": 1}\n'), "metrics.jsonl is there without the config"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_stands_in_the_way_is_said_first(
    name: str, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = CASES[name]
    make(tmp_path)
    before = sorted((path, path.read_bytes() if path.is_file() else b"") for path in tmp_path.rglob("*"))
    monkeypatch.setattr("train.train.ready", lambda: pytest.fail("the libraries are loaded before it is refused"))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        train(Train(model=tiny, data=Data("pictures"), run="set/mine", device="cpu"))
    assert "choose another name with run=..." in str(caught.value)
    assert before == sorted((path, path.read_bytes() if path.is_file() else b"") for path in tmp_path.rglob("*"))


def test_what_is_refused_is_not_copied_to_the_mirror(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i, i, i)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text("grey")
    file("runs/mine/config.yaml", b"model: flux")(tmp_path)
    with pytest.raises(ValueError, match=r"config\.yaml is none that a run wrote"):
        train(Train(model=tiny, data=Data("pictures"), run="mine", device="cpu", mirror=f"file://{tmp_path}/copy"))
    assert not (tmp_path / "copy").exists()


def test_what_a_run_does_not_write_may_lie_beside_it(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("holiday.png", "notes.txt", "adapter/notes.txt", "checkpoints/step-old/x", "wandb/x"):
        file(f"runs/mine/{name}")(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (i, i, i)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text("grey")
    reached: list[bool] = []

    def stop() -> None:
        reached.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr("train.train.ready", stop)
    with pytest.raises(KeyboardInterrupt):
        train(Train(model=tiny, data=Data("pictures", 64), run="mine", device="cpu"))
    assert reached
