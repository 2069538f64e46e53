"""Commands from outside: exit codes, one paragraph of error, nothing left behind."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from infer.device.device import pick_device
from infer.drawing.settings import Draw
from infer.program.command import run_command
from infer.program.errors import INTERRUPTED
from infer.program.paths import ROOT
from infer.program.peers import PEERS
from infer.program.settings import nearest, settings
from infer.save import Save
from train.run.config import Train


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


def paragraph(text: str) -> str:
    """The one paragraph of an error."""
    assert "Traceback" not in text and '  File "' not in text
    (line,) = text.strip().splitlines()
    return line


MISTAKES = [
    ("precision.bits=3", "there is no setting 'precision.bits'; choose one of precision.kind, precision.compute_dtype"),
    ("precision.knd=nf4", "there is no setting 'precision.knd'; did you mean precision.kind?"),
    ("kind=nf4", "there is no setting 'kind'; did you mean precision.kind?"),
    ("precison.kind=nf4", "there is no setting 'precison'; did you mean precision?"),
    ("precison=nf4", "there is no setting 'precison'; did you mean precision?"),
    ("bits=3", "there is no setting 'bits'; --help shows all with their values"),
    ("+bits=3", "there is no setting 'bits'; --help"),
    ("+precision.bits=3", "there is no setting 'precision.bits'; choose"),
    ("~out", "out is taken away, but every setting has a value; leave the ~ out"),
    ("~precision.t5", "precision.t5 is taken away"),
    ("precision=nf5", "there is no precision=nf5; did you mean nf4? there are "),
    (
        "model=huge",
        "there is no model=huge; there are dev, flux2_dev, klein4b,",
    ),
    ("+optimm=adamw", "there is no setting 'optimm'"),
    ("precision@p=nf4", "there is no group 'precision@p'. Did you mean to override precision?"),
    (
        "precision.outlier_threshold=high",
        "precision.outlier_threshold is 'high' (Value 'high' of type 'str' could not be",
    ),
    ("precision.double_quant=3.5", "precision.double_quant is 3.5 .*; give true or false"),
    ("precision.skip_modules=a", "precision.skip_modules is 'a' .*; give a list in brackets"),
    ("precision.kind=null", "precision.kind is null .*; give a value, not null"),
    ("precision.kind=a,b", "precision.kind is 'a,b'; choose one of"),
    ("precision.skip_modules=a,b", "'precision.skip_modules=a,b' could be a list or text; write name="),
    ("out=null", "out is null .*; give a value, not null, or for the word itself 'out=\"null\"'"),
    ("~precision", "precision is taken away, but every setting has a value"),
    ("~model", "model is taken away"),
    ("precision=null", "there is no precision=null; there are"),
    ("precision=4", "there is no precision=4; there are"),
    ("precision=true", "there is no precision=true; there are"),
    ("model=1e3", "there is no model=1e3; there are"),
    ("model=läufe", "there is no model=läufe; there are"),
    ("model.path2=a", "there is no setting 'model.path2'; did you mean model.path?"),
    ("precision.dtype=a", "there is no setting 'precision.dtype'; did you mean precision.compute_dtype?"),
    ("precision.quant=true", "there is no setting 'precision.quant'; did you mean precision.double_quant?"),
    ("out=${nope}", "out: Interpolation key 'nope' not found; mend that value"),
    ("out=???", "out has no value; write out=..."),
    ("precision.skip_modules=[a", "the argument 'precision.skip_modules=[a' cannot be read .*; write name=value"),
    ("out", "the argument 'out' has no name; write name=value, as in model.path=..."),
    ("=a", "the argument '=a' has no name; write name=value"),
    ("--out=a", "'--out=a' is no flag; settings are written without dashes, as out=a"),
    ("--no-such", "'--no-such' is no flag; settings are written without dashes, as no_such=..."),
    ("--config-name=other", "Leave --config-name and --config-path out"),
]


@pytest.mark.parametrize("argument, said", MISTAKES, ids=[argument for argument, _ in MISTAKES])
def test_a_mistake_in_the_settings_is_named_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    assert run(monkeypatch, lambda _: pytest.fail("it ran"), argument) == 2
    out, err = capsys.readouterr()
    parts = [re.escape(part) for part in said.split(" .*")]
    assert re.search("^error: .*" + " .*".join(parts), paragraph(err)) and out == ""


# what a newcomer types: names of other trainers, paths given to a group, words without a name
STRANGERS = [
    (Train, "train", "learning_rate=1e-4", "there is no setting 'learning_rate'; here it is called optim.lr"),
    (Train, "train", "--lora-rank=8", "settings are written without dashes, as adapter.rank=8"),
    (Train, "train", "--max_train_steps", "settings are written without dashes, as steps=7"),
    (Train, "train", "--batch-size=2", "settings are written without dashes, as data.batch_size=2"),
    (Train, "train", "adapter.network_dim=8", "here it is called adapter.rank"),
    (
        Train,
        "train",
        "adapter=runs/a/adapter",
        "there is no adapter=runs/a/adapter; .*is given as adapter.start=runs",
    ),
    (Train, "train", "data=pics", "there is no data=pics; there are folder; .*is given as data.path=pics"),
    (Train, "train", "model=a/b-c", "there is no model=a/b-c; .*is given as model.path=a/b-c"),
    (Train, "train", "model=flux.gguf", "is given as model.path=flux.gguf"),
    (Train, "train", "precision=8bit", "there is no precision=8bit; there are auto, bf16"),
    (Train, "train", "experiment=configs/experiment/dev_8gb.yaml", "did you mean dev_8gb?"),
    (Train, "train", "pics", "the argument 'pics' has no name; write name=value, as in data.path=pics"),
    (Train, "train", "nothing", "the argument 'nothing' has no name; write name=value, as in data.path=..."),
    (Draw, "draw", "a red star", "the argument 'a red star' has no name; .*as in 'prompt=\"a red star\"'"),
    (Draw, "draw", "adapter=mine", "adapter is set by its parts: adapter.path=..., adapter.name=..."),
]


@pytest.mark.parametrize("schema, name, argument, said", STRANGERS, ids=[each[2] for each in STRANGERS])
def test_what_a_newcomer_types_is_answered_with_the_right_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    schema: Any,
    name: str,
    argument: str,
    said: str,
) -> None:
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", argument, *(["7"] if argument == "--max_train_steps" else [])])
    with pytest.raises(SystemExit) as stop:
        run_command(name, schema, lambda _: pytest.fail("it ran"))
    parts = [re.escape(part) for part in said.split(" .*")]
    assert stop.value.code == 2 and re.search(" .*".join(parts), paragraph(capsys.readouterr().err))


def test_names_of_other_trainers_lead_to_settings_that_there_are() -> None:
    names = {*settings(Train), *settings(Draw)}
    assert set(PEERS.values()) <= names
    assert not PEERS.keys() & {name.rpartition(".")[2] for name in names}  # none of them is a name here too


def test_hydras_own_flags_still_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, shown in (("--help", "precision.outlier_threshold=6.0"), ("--cfg=job", "outlier_threshold: 6.0")):
        assert run(monkeypatch, lambda _: pytest.fail("it ran"), flag) == 0
        assert shown in capsys.readouterr().out
    assert os.environ.get("HYDRA_FULL_ERROR") is None


def test_every_setting_has_a_name() -> None:
    names = list(settings(Train))
    assert {"steps", "optim", "optim.lr", "data.prior.prompt", "precision.t5", "previews"} <= set(names)
    assert nearest("data.prior.promt", names) == "; did you mean data.prior.prompt?"
    assert nearest("resolution", names) == "; did you mean data.resolution?"
    assert nearest("xyzzy", names) == ""
    assert len(names) == len(set(names)) > 80


FAR = str(Path(tempfile.gettempdir()) / "elsewhere")


def library(text: str) -> ValueError:
    """An error that our code did not raise."""
    names: dict[str, Any] = {}
    exec(compile(f"def f():\n    raise ValueError({text!r})", f"{FAR}/lib.py", "exec"), names)
    try:
        names["f"]()
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("x is 1; set it to 2"), 2, "x is 1; set it to 2"),
        (ValueError("two\nlines"), 2, "two lines"),
        (OSError(errno.ENOSPC, "", "/a/b"), 2, "No space left on device: /a/b; free some space, then start again"),
        (OSError(errno.EIO, ""), 2, "Input/output error: reading or writing a file; the disk or the network failed"),
        (PermissionError(errno.EACCES, "", "/a"), 2, "Permission denied: /a; change its permissions"),
        (OSError(errno.EROFS, "", "/a"), 2, "Read-only file system: /a; mount it writable"),
        (MemoryError(), 2, "the machine ran out of memory (MemoryError); choose precision=nf4"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "the GPU ran out of memory (CUDA out of memory); "),
        (OSError("a library's own"), 1, "a defect of flux-lora, not of yours: OSError: a library's own at "),
        (KeyError("a defect"), 1, "KeyError: 'a defect' at test_command.py line"),
        (library("shapes differ"), 1, "ValueError: shapes differ at lib.py line 2"),
        (None, 0, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: Exception | None,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    got: list[Save] = []

    def work(options: Save) -> None:
        got.append(options)
        if error is not None:
            raise error

    assert run(monkeypatch, work, "out=there", "precision=fp4") == code
    assert [(options.out, options.precision.kind) for options in got] == [("there", "fp4")]
    err = capsys.readouterr().err
    assert (err == "") == (code == 0)
    kept = list(tmp_path.iterdir())
    if code:
        line = paragraph(err)
        assert line.startswith("error: ") and said in line
    if code == 1:
        (file,) = kept
        assert f"its traceback is in {file} (FLUX_DEBUG=1 shows it)" in err
        text = file.read_text()
        assert text.index("out=there precision=fp4") < text.index("Traceback") and "torch 2." in text
    else:
        assert not kept
    monkeypatch.setenv("FLUX_DEBUG", "1")
    assert run(monkeypatch, work, "out=there", "precision=fp4") == code
    err = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in err) == (code != 0) and said.split(";")[0] in err


def test_ctrl_c_ends_a_command_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(options: Save) -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, work, "out=there") == INTERRUPTED == 128 + signal.SIGINT
    assert (
        paragraph(capsys.readouterr().err)
        == "stopped by Ctrl-C; nothing half-written is left, the same command starts again"
    )


def test_a_traceback_that_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(_: Save) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert run(monkeypatch, work, "out=there") == 1
    said = paragraph(capsys.readouterr().err)
    assert "its traceback cannot be kept (No space left on device): FLUX_DEBUG=1 shows it" in said


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
