"""Commands from outside: exit codes, one paragraph of error, nothing left behind."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from infer.command import ROOT, pick_device, refuse, run_command
from infer.save import Save


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FLUX_DEBUG", raising=False)
    yield
    GlobalHydra.instance().clear()


def test_what_a_user_can_mend(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "train.py"), "data.path=/does/not/exist"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.strip().startswith("error: data.path '/does/not/exist' does not exist; set it to")
    assert not list(tmp_path.iterdir())


def run(monkeypatch: pytest.MonkeyPatch, work: Callable[[Save], Any], *arguments: str) -> int:
    """The exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["save.py", *arguments])
    try:
        run_command("save", Save, work)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


@pytest.mark.parametrize(
    "argument, said",
    [
        ("precision.bits=3", "Key 'bits' not in 'Precision'"),
        ("bits=3", "Key 'bits' not in 'Save'"),
        ("precision=nf5", "Could not find 'precision/nf5'"),
        ("precision.outlier_threshold=high", "Value 'high' of type 'str' could not be converted to Float"),
    ],
)
def test_what_hydra_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    assert run(monkeypatch, lambda _: pytest.fail("it ran"), argument) == 1
    out, err = capsys.readouterr()
    assert said in err and out == ""
    assert "Traceback" not in err and '  File "' not in err


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("x is 1; set it to 2"), 2, "\nerror: x is 1; set it to 2\n"),
        (OSError(28, "No space left on device", "/a/b"), 2, "\nerror: No space left on device: /a/b; free some space"),
        (OSError("a library's own"), 1, "a library's own"),
        (KeyError("a defect"), 1, "a defect"),
        (None, 0, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception | None, code: int, said: str
) -> None:
    got: list[Save] = []

    def work(options: Save) -> None:
        got.append(options)
        if error is not None:
            raise error

    assert run(monkeypatch, work, "out=there", "precision=fp4") == code
    assert [(options.out, options.precision.kind) for options in got] == [("there", "fp4")]
    err = capsys.readouterr().err
    assert err.startswith(said) if code == 2 else said in err
    assert ("Traceback" in err or "Error executing job" in err) == (code == 1)


def test_refuse_shows_the_traceback_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^x$"):
        refuse(ValueError("x"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def sees(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    sees(0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device={name}, but torch sees no CUDA device.*device=cpu or auto"):
            pick_device(name)
    for name in ("gpu", "", "cuda:x"):
        with pytest.raises(ValueError, match=f"device is '{name}'; choose auto, cuda or cpu"):
            pick_device(name)
    sees(2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device=cuda:2, but torch sees 2 CUDA devices; count from cuda:0"):
        pick_device("cuda:2")
