"""Sweeps through Hydra's real launchers and sweepers; most with a stand-in for the training (tests/stand_in.py)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors import safe_open

from infer.adapter.read import FILE
from infer.program.errors import INTERRUPTED
from infer.program.paths import ROOT
from scripts.tiny.make_style import make_style
from train.sweeps.point import RECORD, name_point, reason_of, spell, try_lock
from train.sweeps.sweep import main, varied

TRAIN = [sys.executable, str(ROOT / "train/train.py")]
STAND_IN = [f"sweep.launch=[{sys.executable},{ROOT / 'tests/stand_in.py'}]", "sweep.compare=null"]


def sweep(cwd: Path, *options: str, launcher: str = "basic", code: int = 0) -> str:
    """What a sweep prints."""
    command = [*TRAIN, "-m", "run=s", f"hydra/launcher={launcher}", *STAND_IN, *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def calls(cwd: Path) -> list[dict[str, Any]]:
    file = cwd / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def record(cwd: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((cwd / "runs" / "s" / name / RECORD).read_text())
    return read


def trained(cwd: Path) -> list[str]:
    return sorted(call["options"]["run"] for call in calls(cwd) if call["script"] == "train")


def test_a_sweep_finishes_what_can_be_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = ["adapter.rank=0,2,13", "optim.lr=1e-3,0.5", "optim.warmup=3", "data.trigger='a, b'"]
    said = sweep(tmp_path, *options, code=2)
    done = ["rank-2_lr-0.001", "rank-2_lr-0.5"]
    assert sorted(path.parent.name for path in tmp_path.glob("runs/s/*/adapter")) == sorted(done)
    assert "error: 4 of 6 points failed (" in said and said.rstrip().endswith("the same command again tries them again")
    assert "rank-0_lr-0.5: adapter.rank is 0; it must be 1 or more" in said
    assert record(tmp_path, "rank-13_lr-0.001")["error"] == "killed by signal 9"
    assert trained(tmp_path) == sorted(f"s/{name}" for name in done)
    one = next(call for call in calls(tmp_path) if call["options"].get("run") == "s/rank-2_lr-0.5")["options"]
    assert (one["optim.lr"], one["optim.warmup"], one["data.trigger"]) == ("0.5", "3", "'a, b'")
    assert "track.group" not in one and not any(key.startswith("sweep") for key in one)
    results = {point["name"]: point for point in json.loads((tmp_path / "runs/s/results.json").read_text())}
    assert results["rank-2_lr-0.5"]["figures"]["validation_loss"] == 0.5
    assert {name for name, point in results.items() if point["front"]} == set(done)

    # again: what is done is left alone, what failed is tried once more, and what is gone is made again
    before = {name: record(tmp_path, name) for name in done}
    (tmp_path / "runs" / "s" / "rank-2_lr-0.5" / "adapter" / FILE).unlink()
    os.utime(tmp_path / "runs/s/rank-13_lr-0.5/train.log", (0, 0))
    sweep(tmp_path, *options, code=2)
    assert trained(tmp_path) == ["s/rank-2_lr-0.001", "s/rank-2_lr-0.5", "s/rank-2_lr-0.5"]
    assert record(tmp_path, "rank-2_lr-0.001") == before["rank-2_lr-0.001"]
    assert (tmp_path / "runs/s/rank-13_lr-0.5/train.log").stat().st_mtime > 0


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "locks" / "gpu-0.lock"
    code = "import time, pathlib, sys\nfrom train.sweeps.point import try_lock\n"
    code += "with try_lock(pathlib.Path(sys.argv[1])) as held:\n    print(held, flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with try_lock(file) as held:
        assert not held
    holder.kill()
    holder.wait()
    with try_lock(file) as held, try_lock(file) as again:
        assert held and not again


@pytest.mark.parametrize("launcher", ["processes", "submitit", "ray"])
def test_launchers(launcher: str, tmp_path: Path) -> None:
    if launcher == "ray":
        pytest.importorskip("ray")
    more = ["sweep.gpus=[3,5]", "hydra.launcher.n_jobs=3"] if launcher == "processes" else []
    said = sweep(tmp_path, "adapter.rank=1,0,2,3", *more, launcher=launcher, code=2)
    assert "1 of 4 points failed (rank-0: adapter.rank is 0" in said
    assert trained(tmp_path) == ["s/rank-1", "s/rank-2", "s/rank-3"]
    if launcher == "processes":
        points = sorted((c for c in calls(tmp_path) if c["script"] == "train"), key=lambda call: call["start"])
        assert {call["gpu"] for call in points} <= {"3", "5"}
        for one, other in [(a, b) for a in points for b in points if a is not b]:
            assert one["gpu"] != other["gpu"] or one["end"] <= other["start"] or other["end"] <= one["start"]
    if launcher == "submitit":
        assert len(list(tmp_path.glob("runs/s/.submitit/**/*_result.pkl"))) == 4


def test_optuna_chooses_and_goes_on(tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    options = [
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=2", "adapter.rank=choice(0,2,4)",
        "optim.lr=tag(log,interval(1e-5,1e-3))", "sweep.objectives={validation_loss:minimize,seconds:minimize}",
        "~sweep.objectives.memory_gib",
    ]  # fmt: skip
    said = sweep(tmp_path, *options[:-2], options[-1], code=2)
    study = optuna.load_study(
        study_name="sweep", storage=JournalStorage(JournalFileBackend(str(tmp_path / "runs/s/optuna.journal")))
    )
    assert len(study.trials) == 5 and [direction.name for direction in study.directions] == ["MINIMIZE"] * 2
    done = [trial for trial in study.trials if trial.values]
    assert 0 < len(done) < 5 and "points failed" in said
    for trial in done:
        assert trial.values == [1 / int(trial.params["adapter.rank"]), int(trial.params["adapter.rank"])]
        assert 1e-5 <= trial.params["optim.lr"] <= 1e-3
    failed = [trial.params for trial in study.trials if not trial.values]
    before = trained(tmp_path)
    # again: as many as failed are tried again, those first, and nothing that is done
    sweep(tmp_path, *options[:-2], options[-1], code=2)
    again = study.get_trials()[5:]
    assert len(again) == len(failed) and [trial.params for trial in again][: len(failed)] == failed
    assert trained(tmp_path) == before


def test_a_sweep_written_in_an_experiment(tmp_path: Path) -> None:
    """Its values name the points, and the points find the folder that it lies in."""
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "ranks.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      adapter.rank: 2,4\noptim:\n  lr: 0.5\n"
    )
    sweep(tmp_path, "experiment=ranks", "--config-dir", "own")
    assert trained(tmp_path) == ["s/rank-2", "s/rank-4"]
    for name in ("rank-2", "rank-4"):
        command = record(tmp_path, name)["stages"]["train"]["command"]
        assert command[command.index("--config-dir") + 1] == str(tmp_path / "own") and "experiment=ranks" in command
        assert record(tmp_path, name)["config"]["optim"]["lr"] == 0.5


def test_an_interrupt_reaches_the_point_and_the_next_call_goes_on(tmp_path: Path) -> None:
    command = [*TRAIN, "-m", "run=s", *STAND_IN, "adapter.rank=2,99"]
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # in the background, shells ignore it
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heard,
    )
    log = tmp_path / "runs/s/rank-99/train.log"
    for _ in range(600):
        if log.is_file() and "asleep" in log.read_text():  # its Python has begun, and hears the signal
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)  # the sweep alone: it hands it on
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "Traceback" not in err
    assert err.endswith("stopped by Ctrl-C; done points are kept in runs/s, the same command goes on\n")
    assert record(tmp_path, "rank-99")["state"] == "running" and record(tmp_path, "rank-2")["state"] == "done"
    assert log.read_text().count("KeyboardInterrupt") == 1  # it was told, once


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run=a,b"], "run has several values, but it names the sweep's folder"),
        (["run=../a"], "run is '../a'; choose a plain name"),
        (["sweep.objectives.seconds=least"], "sweep.objectives.seconds is 'least'; choose one of minimize, maximize"),
    ],
)
def test_what_cannot_start(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "adapter.rank=1,2", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "keys", "name"),
    [
        (["precision=nf4", "adapter.rank=4"], ["precision", "adapter.rank"], "precision-nf4_rank-4"),
        (["seed=0", "run=x"], ["seed"], "seed-0"),
        (["data.resolution=[512,768]"], ["data.resolution"], "resolution-512-768-"),
        (["optim.lr=0.00031622776601683794"], ["optim.lr"], "lr-0.0003162-"),
        (["optim.lr=1e-05"], ["optim.lr"], "lr-1e-05"),
        (["+a.steps=1", "steps=2"], ["a.steps", "steps"], "a.steps-1_steps-2"),
        (["data.path=a/../b"], ["data.path"], "path-a-.-b-"),
        ([], [], "point"),
    ],
)  # fmt: skip
def test_names(overrides: list[str], keys: list[str], name: str) -> None:
    made = name_point(overrides, keys)
    assert made.startswith(name) and (made == name) == (not name.endswith("-"))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_names_differ_and_are_plain(values: list[str]) -> None:
    names = [name_point([f"data.trigger={value}"], ["data.trigger"]) for value in values]
    assert names[0] != names[1]
    for name in names:
        assert len(name) < 120 and re.fullmatch(r"[A-Za-z0-9_.+-]+", name)
        assert ".." not in name and not name.startswith(".")


KEYS = st.from_regex(r"[a-z]{1,5}", fullmatch=True)
NUMBERS = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(PLAIN)
def test_spelled_values_are_read_by_hydra_as_they_are(value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={spell(value)}"])
    config = OmegaConf.create({"key": override.value()})
    assert OmegaConf.to_container(config, resolve=True) == {"key": value}


def test_settings_with_several_values_are_found() -> None:
    options = [
        "precision=nf4,int8",
        "seed=range(3)",
        "steps=2",
        "optim.lr=interval(1,2)",
        "data.resolution=[1,2]",
        "+x=1,2",
    ]
    assert varied(options) == ["precision", "seed", "optim.lr", "x"]


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("$ c\nbar\n\nerror: a is 1; set it\n", 2, "a is 1; set it"),
        ("$ c\n\nerror: first\n\nmore\n\nerror on rank 1: second\nTraceback of torchrun\n\nx", 1, "second"),
        ("$ c\nSegmentation fault\n", -11, "killed by signal 11: Segmentation fault"),
        ("$ c\n", 1, "exit code 1"),
    ],
)
def test_reasons(text: str, code: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert reason_of(tmp_path / "log", code) == reason


REAL = [
    "run=s", "data.path=pictures", "data.resolution=64", "data.batch_size=2", "steps=2", "validation_levels=1",
    "validate_every=0", "device=cpu", "sampling.steps=1", "sampling.height=64", "sampling.width=64",
    "previews=[a red star]", "memory=plain", "adapter.rank=2,4",
]  # fmt: skip


def stored(file: Path) -> list[str]:
    with safe_open(file, "np") as shard:
        return [f"{file.parent.name}/{key}" for key in shard.keys()]  # noqa: SIM118 (it is no dictionary)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "processes", "submitit", "ray"])
def test_points_train_compare_and_are_reported(launcher: str, tmp_path: Path) -> None:
    """The whole: real training and comparison, under each launcher; the best point's config trains to the same end."""
    if launcher == "ray":
        pytest.importorskip("ray")
    make_style(tmp_path / "pictures", 8, seed=1)
    more = ["track=tensorboard"] if launcher == "basic" else []
    command = [*TRAIN, "-m", f"hydra/launcher={launcher}", *REAL, *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((tmp_path / "runs/s/results.json").read_text())
    assert [(point["name"], point["state"]) for point in points] == [("rank-2", "done"), ("rank-4", "done")]
    for point in points:
        assert {"validation_loss", "memory_gib", "seconds", "image_seconds", "psnr_base"} <= point["figures"].keys()
        results = json.loads((tmp_path / "runs/s" / point["name"] / "compare/results.json").read_text())
        assert {(row["prompt"], row["seed"], row["precision"]) for row in results["rows"]} == {("a red star", 0, "nf4")}
    kept = [key for file in tmp_path.glob("runs/cache/[pt]*/*.safetensors") for key in stored(file)]
    assert len(kept) == len(set(kept)) > 0  # none was encoded twice, though points started together
    page = (tmp_path / "runs/s/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    if launcher != "basic":
        return
    assert list(tmp_path.glob("runs/s/rank-2/tensorboard/events*"))
    best = min(points, key=lambda point: point["figures"]["validation_loss"])["name"]
    command = [*TRAIN, "--config-dir", "runs/s", "experiment=best", "run=again", "device=cpu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    same = [(tmp_path / "runs" / run / "adapter" / FILE).read_bytes() for run in ("again", f"s/{best}")]
    assert same[0] == same[1]


def test_the_best_point_as_an_experiment(tmp_path: Path) -> None:
    """Composed again it gives the settings that the point had, awkward texts included."""
    trigger = r"data.trigger='\${root:} \'x\': #1, 100% \\'"
    sweep(tmp_path, "adapter.rank=2,4", trigger, "optim=prodigy", "data.sources=[{path:a,repeats:2.5}]")
    config = record(tmp_path, "rank-4")["config"]
    assert config["data"]["trigger"].startswith("${root:} 'x': #1, 100% ")
    ConfigStore.instance().store(name="train_schema", node={})
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        again: Any = OmegaConf.to_container(
            compose("train", ["experiment=best", f"hydra.searchpath=[{tmp_path / 'runs/s'}]"]), resolve=True
        )
    for aside in ("run", "sweep"):
        config.pop(aside), again.pop(aside)
    assert again == config and again["adapter"]["rank"] == 4
