"""The drawing process: draws what draw.py draws, loads once, leaves when a training begins, and dies with a word."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.draw import draw
from infer.drawing.settings import Draw
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from infer.resident import ask as asking
from infer.resident.settings import FOLDER, SOCKET
from infer.resident.state import read_state
from infer.resident.turns import PROCESS, TRAINING, is_held, training_turn
from infer.sample.generate import Sampling
from tests.forked import Forked

SMALL = Sampling(steps=1, height=32, width=32)


@pytest.fixture(scope="module")
def home(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters."""
    folder = tmp_path_factory.mktemp("home")
    transformer = load_transformer(tiny, Precision("bf16"), torch.device("cpu"))
    parameters = attach(transformer, Adapter(rank=4, alpha=9), seed=0)
    for name in ("one", "two"):
        for parameter in parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        save_adapter(transformer, folder / name, {})
    return folder


@pytest.fixture(autouse=True)
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


class Process:
    """A drawing process of the tests, started again if it has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, self.start(folder)

    def start(self, folder: Path) -> Forked:
        return Forked([str(ROOT / "infer/serve.py"), "idle=60"], folder, os.environ, folder / "words")

    def running(self) -> Forked:
        if self.now.poll() is not None:
            self.now = self.start(self.folder)
        end = time.monotonic() + 60
        while (found := asking._connect()) is None:
            assert time.monotonic() < end and self.now.poll() is None, (self.folder / "words").read_text()
            time.sleep(0.05)
        found.close()
        return self.now

    def ended(self) -> str:
        code, words = self.now.finish(30)
        assert code == 0, words
        return words


@pytest.fixture(scope="module")
def resident(home: Path) -> Iterator[Process]:
    process = Process(home)
    yield process
    if process.now.poll() is None:
        process.now.send_signal(signal.SIGKILL)
        process.now.process.join()


def options(model: Model, out: str, prompt: str = "a star", **changes: Any) -> Draw:
    return replace(Draw(model, prompt=prompt, sampling=SMALL, out=out, device="cpu"), **changes)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def test_it_draws_what_draw_draws_and_loads_once(
    resident: Process, tiny: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, whatever was on before: an adapter, another one at two strengths, a further prompt, none."""
    process = resident.running()
    one, two = Trained("one"), Trained("two")
    asked = [{"adapter": one}, {"adapter": two, "weights": [1.0, 0.5]}, {"adapter": two, "prompt": "a cup"}, {}]
    for number, changes in enumerate(asked):
        drawn = options(tiny, f"r{number}", **changes)
        files = draw(replace(drawn, resident=True))
        said = capsys.readouterr().out
        assert ("nothing is loaded" in said) == (number > 0), said
        assert str(files[0]) in said and re.search(rf"^{len(files) - (len(files) > 1)} pictures? of 32x32", said, re.M)
        for file, expected in zip(files, draw(replace(drawn, out=f"d{number}")), strict=True):
            assert (pixels(file) == pixels(expected)).all(), (number, file)
        capsys.readouterr()
    state = read_state()
    assert state is not None and state["state"] == "waiting" and state["pid"] == process.pid
    assert state["model"] == f"{tiny.path}, nf4"


def test_another_precision_takes_its_place(resident: Process, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    resident.running()
    draw(options(tiny, "fp32", precision=Precision("fp32"), resident=True))
    assert "nothing is loaded" not in capsys.readouterr().out
    state = read_state()
    assert state is not None and state["model"] == f"{tiny.path}, fp32"


def test_what_is_wrong_is_said_to_who_asked_and_the_process_goes_on(
    resident: Process, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = resident.running()
    taken = options(tiny, "taken", resident=True)
    draw(taken)
    with pytest.raises(ValueError, match=r"taken/a-star-0.png exists; choose another folder"):
        draw(taken)
    with pytest.raises(ValueError, match=r"taken/a-star-0.png exists"):  # the process looks too
        asking.ask("draw", taken)
    guided = replace(taken, out="other", sampling=replace(SMALL, guidance=2.0), model=Model("nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        asking.ask("draw", guided)
    draw(replace(taken, out="fine"))
    assert process.poll() is None


def test_it_leaves_when_a_training_begins_which_waits_for_it(resident: Process, tiny: Model) -> None:
    resident.running()
    draw(options(tiny, "before", resident=True))
    told: list[str] = []
    with training_turn(told.append):
        assert not is_held(PROCESS) and told == ["the drawing process gives its memory back first"]
    assert "ended: a training has begun" in resident.ended()
    state = read_state()
    assert state is not None and (state["state"], state["reason"]) == ("ended", "a training has begun")


def test_beside_a_training_it_draws_what_was_asked_for_and_leaves(resident: Process, tiny: Model) -> None:
    code = "import time; from infer.resident.turns import training_turn\nwith training_turn(print): time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not is_held(TRAINING):
            time.sleep(0.02)
        resident.running()
        assert draw(options(tiny, "beside", resident=True))[0].is_file()
        assert "ended: a training has begun" in resident.ended()
    finally:
        child.kill()
        child.wait()
    assert not is_held(TRAINING)  # the kernel has unlocked it


def test_its_death_is_said(resident: Process, tiny: Model) -> None:
    """It is killed while it draws: by the command, and to whoever watches."""
    process = resident.running()
    many = options(tiny, "many", seeds=list(range(500)), resident=True)
    errors: list[ValueError] = []

    def asked() -> None:
        try:
            draw(many)
        except ValueError as error:
            errors.append(error)

    thread = Thread(target=asked)
    thread.start()
    while not (Path("many") / "a-star-1.png").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    thread.join(20)
    assert "the drawing process died: it was killed, or memory ran out" in str(errors[0])
    process.process.join(10)  # the kernel closes its socket before it unlocks its files
    state = read_state()
    assert state is not None and state["state"] == "gone" and "gone without a word" in state["reason"]
    assert all(pixels(file).shape == (32, 32, 3) for file in Path("many").glob("a*.png"))  # none is half written


def test_one_ends_at_sigterm_after_its_picture(resident: Process, tiny: Model) -> None:
    process = resident.running()

    def end() -> None:
        while not (Path("some") / "a-star-0.png").is_file():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)

    thread = Thread(target=end)
    thread.start()
    with pytest.raises(ValueError, match="was asked to end; what was drawn before is written"):
        draw(options(tiny, "some", seeds=list(range(500)), resident=True))
    thread.join()
    assert 0 < len(list(Path("some").glob("*.png"))) < 500
    assert "ended: it was asked to end" in resident.ended() and not SOCKET.exists()


def test_who_asks_and_leaves_stops_the_drawing(resident: Process, tiny: Model) -> None:
    resident.running()
    connection = asking._connect()
    assert connection is not None
    from dataclasses import asdict

    many = options(tiny, "left", seeds=list(range(500)))
    connection.sendall((json.dumps({"what": "draw", "options": asdict(many)}) + "\n").encode())
    while not (Path("left") / "a-star-0.png").is_file():
        time.sleep(0.02)
    connection.close()
    draw(options(tiny, "after", resident=True))  # is taken as soon as that has ended
    assert len(list(Path("left").glob("*.png"))) < 500
    connection = asking._connect()
    assert connection is not None
    connection.sendall(b"no request\n")
    with connection.makefile() as answer:
        assert "a defect" in answer.read()
    connection.close()
    assert FOLDER.stat().st_mode & 0o077 == 0  # nobody else may ask
