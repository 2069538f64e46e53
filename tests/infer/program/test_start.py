"""What the user typed is answered before anything heavy is imported."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infer.checkpoint.model import Model
from infer.program.errors import MEND
from infer.program.paths import ROOT
from train.data.dataset import Data
from train.run.config import Train
from train.state import steps
from train.state.identity import check_recorded, record_config

HEAVY = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib", "scipy")
# runs one command line after another; after each it says how it ended, and what is imported by then
PROBE = """
import contextlib, io, json, runpy, sys
heavy, lines = json.loads(sys.argv[1])
for entry, *line in lines:
    sys.argv = [entry, *line]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(entry, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue() + err.getvalue(), [name for name in heavy if name in sys.modules]]))
"""
SETTING = (["nosuch=1"], "there is no setting 'nosuch'")
RUN = (["run=../x"], "run is '../x'")
MODEL = (["model.path=/nowhere"], "/nowhere")
FOLDER = (["model.path={root}/docs"], "model_index.json")
DEVICE = (["device=gpu"], "device is 'gpu'")
DATA = (["data.path=/nowhere"], "'/nowhere' does not exist")
TABLE = (["data.path=/nowhere/a.parquet"], "does not exist")
ADAPTER = (["adapter.path=/nowhere"], "no adapter at /nowhere")
TYPED = (["optim.lr=fast"], "optim.lr is 'fast'")
JOB = [
    SETTING, RUN, MODEL, FOLDER, DEVICE, DATA, TABLE, TYPED,
    (["steps=0"], "steps is 0"),
    (["adapter.targets=nothing"], "matches no linear layer"),
    (["adapter.start=/nowhere"], "no adapter at /nowhere"),
    (["adapter.start={root}/README.md"], "no adapter that can be read"),
    (["adapter.recovery=/nowhere"], "no adapter at /nowhere"),
    (["precision.skip_modules=[nothing]"], "no linear layer of the model has that name"),
    (["resume=step-000007", "run=no-such-run"], "resume is 'step-000007'"),
    (["model=nosuch"], "there is no model=nosuch"),
    (["--steps", "5"], "is no flag"),
]  # fmt: skip
MISTAKES: dict[str, list[tuple[list[str], str]]] = {
    "train/train.py": JOB,
    "train/selfcheck.py": [SETTING, RUN, MODEL, DEVICE, DATA, TYPED],
    "train/cache.py": [SETTING, MODEL, DEVICE, DATA],
    "train/look.py": [SETTING, RUN, DATA],
    "train/write_captions.py": [
        SETTING, DEVICE, (["data.path=/nowhere"], "'/nowhere' is no folder here"), (["tokens=0"], "tokens is 0"),
        (["captioner=gone"], "captioner 'gone' is no folder here and no Hub id"),
        (["data.path={root}/configs"], "holds no pictures"),
    ],
    "train/page.py": [SETTING, (["port=99999999"], "port is 99999999"), (["folders=[/nowhere]"], "/nowhere")],
    "train/plan.py": [
        SETTING, TYPED, MODEL,
        (["adapter.targets=nothing"], "matches no linear layer"),
        (["fit_gib=0.1"], "nothing fits"),
    ],
    "train/gap.py": [SETTING, RUN, MODEL, DEVICE, DATA, ADAPTER, (["levels=0"], "levels is 0")],
    "train/transfer.py": [SETTING, RUN, MODEL, DEVICE, DATA, TYPED],
    "train/track.py": [SETTING, (["run=../x", "track=tensorboard"], "run is"), (["track=none"], "track is none")],
    "train/sweep_report.py": [([], "give the sweep's folder"), (["/nowhere"], "/nowhere holds no points")],
    "infer/draw.py": [
        SETTING, MODEL, DEVICE, ADAPTER, (["seeds=[]"], "seeds is []"), (["like=/nowhere.png"], "/nowhere.png"),
        (["adapters=[/nowhere]"], "no adapter at /nowhere"), (["precisions=[nf5]"], "precisions has 'nf5'"),
        (["resident=true", "adapters=[/nowhere]"], "no adapter at /nowhere"),
    ],
    "infer/serve.py": [SETTING, (["idle=0"], "idle is 0")],
    "infer/choose.py": [SETTING, RUN, DEVICE, (["run=no-such-run"], "no-such-run"), (["weights=[]"], "weights is []")],
    "infer/compare.py": [
        SETTING, RUN, MODEL, DEVICE, ADAPTER,
        (["seeds=[]"], "at least one of prompts and of seeds"),
        (["references=/nowhere"], "references is '/nowhere'"),
        (["networks.lpips=/nowhere"], "networks.lpips is '/nowhere'"),
        (["scores.mine=no.such.function"], "scores.mine"),
        (["+recovery.nf4=/nowhere"], "no adapter at /nowhere"),
    ],
    "infer/save.py": [SETTING, DEVICE, MODEL, (["out={root}/docs"], "out is")],
    "infer/merge.py": [SETTING, DEVICE, MODEL, ADAPTER, ([], "adapter.path is null")],
    "infer/convert.py": [SETTING, ADAPTER, (["to=nothing"], "to is 'nothing'")],
    "infer/recover.py": [SETTING, RUN, DEVICE, MODEL],
    "infer/sensitivity.py": [SETTING, RUN, DEVICE, MODEL, (["budget_gib=0"], "budget_gib is 0")],
}  # fmt: skip
RIGHT = {  # what each entry needs beside, so that the mistake alone is left
    "train/train.py": ["data.path={root}/docs"],
    "train/selfcheck.py": ["data.path={root}/docs"],
    "train/cache.py": ["data.path={root}/docs"],
    "train/look.py": ["data.path={root}/docs"],
    "train/write_captions.py": ["data.path={root}/docs"],
    "train/gap.py": ["data.path={root}/docs"],
    "train/transfer.py": ["data.path={root}/docs"],
    "infer/draw.py": ["prompt=a star"],
    "infer/compare.py": ["prompts=[a star]"],
    "infer/save.py": ["out=runs/no-such-folder"],
    "infer/merge.py": ["out=runs/no-such-folder"],
    "infer/convert.py": ["out=no-such-file.safetensors", "to=kohya"],
    "infer/recover.py": ["prompts=[a star]", "held_out=[a heart]"],
}


Answer = tuple[int, str, list[str]]


def answers(lines: list[list[str]], cwd: Path = ROOT) -> list[Answer]:
    """Of one process; the first word of each line is the entry."""
    words = [[str(ROOT / entry), *(word.format(root=ROOT) for word in line)] for entry, *line in lines]
    given = json.dumps([HEAVY, words])
    done = subprocess.run([sys.executable, "-c", PROBE, given], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    return [(code, said, imported) for code, said, imported in found]


def lines_of(entry: str) -> list[list[str]]:
    """Each mistake alone, and --help."""
    lines = [
        [word for word in RIGHT.get(entry, []) if word.partition("=")[0] not in " ".join(mistake)] + mistake
        for mistake, _ in MISTAKES[entry]
    ]
    return [[entry, *line] for line in lines + ([["--help"]] if entry != "train/sweep_report.py" else [])]


@cache
def answers_of(wing: str) -> dict[str, list[Answer]]:
    """Those of all entries of a wing, which share a process: what none of them imports, no line has imported."""
    entries = [entry for entry in MISTAKES if entry.startswith(wing)]
    found = iter(answers([line for entry in entries for line in lines_of(entry)]))
    return {entry: [next(found) for _ in lines_of(entry)] for entry in entries}


def test_every_entry_is_here() -> None:
    found = {
        str(file.relative_to(ROOT))
        for wing in ("train", "infer")
        for file in Path(ROOT, wing).glob("*.py")
        if "\nif __name__ == " in file.read_text() and "sys.path[0] =" in file.read_text()
    }
    assert found == MISTAKES.keys()


@pytest.mark.parametrize("entry", MISTAKES)
def test_a_mistake_and_help_import_nothing_heavy(entry: str) -> None:
    found = answers_of(entry.partition("/")[0])[entry]
    for (code, said, imported), (mistake, expected) in zip(found, MISTAKES[entry], strict=False):
        assert code == MEND and expected in said, (mistake, code, said)
        assert imported == [], mistake
    for code, said, imported in found[len(MISTAKES[entry]) :]:
        assert code == 0 and said.startswith("usage: python ") and imported == []


def test_a_run_that_cannot_go_on_is_told_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is compared before anything heavy is imported, and so is the number of steps."""
    (tmp_path / "set").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (9 * i, 0, 0)).save(tmp_path / f"set/{i}.png")
        (tmp_path / f"set/{i}.txt").write_text("a star")
    monkeypatch.chdir(tmp_path)
    job = Train(model=Model(str(ROOT / "scripts/tiny/model")), data=Data("set", 64), run="mine", steps=40)
    assert check_recorded(job, Path("runs/mine")) is None
    record_config(job, Path("runs/mine"), 2)
    assert check_recorded(job, Path("runs/mine")) is None  # there is nothing yet to go on from
    state, empty = '{"step": 40}', hashlib.sha256(b"").hexdigest()
    for step in (14, 40, 41):
        folder = tmp_path / f"runs/mine/checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        for name in (steps.ADAPTER, steps.OPTIMIZER):
            (folder / name).write_bytes(b"" if step < 41 else b"torn")
        sums = {steps.ADAPTER: empty, steps.OPTIMIZER: empty, steps.STATE: hashlib.sha256(state.encode()).hexdigest()}
        (folder / steps.STATE).write_text(json.dumps({"sha256": sums, "state": state}))
    assert check_recorded(job, Path("runs/mine")) == 2
    auto = replace(job, precision=replace(job.precision, kind="auto", budget_gib=8.0))
    assert check_recorded(auto, Path("runs/mine")) == 2  # compared once it is measured
    own = ["data.path=set/", "data.resolution=64", "run=mine", "device=cpu"]
    changed = (
        (["steps=40", "adapter.rank=3"], "exists with another config (adapter.rank was 16, is 3)"),
        (["steps=40", "data.resolution=32"], "data.resolution was 64, is 32"),
        (["steps=20"], "steps is 20, but run 'mine' is at step 40 already"),
    )
    for (code, said, imported), (_, expected) in zip(
        answers([["train/train.py", *own, *more] for more, _ in changed], tmp_path), changed, strict=True
    ):
        assert code == MEND and expected in said and imported == [], said


def test_a_plan_computes_without_torch() -> None:
    for code, said, imported in answers([["train/plan.py", "model=dev", "fit_gib=12", "json=true"]]):
        assert code == 0 and '"peak_memory_bytes"' in said and imported == []


@pytest.mark.parametrize("command", [*([entry] for entry in MISTAKES), ["train/train.py", "-m"]], ids=" ".join)
def test_outside_of_the_environment_one_line_says_what_to_do(command: list[str], tmp_path: Path) -> None:
    """With -I and -S a Python knows none of the packages that are installed for it."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == MEND
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(("source .venv/bin/activate", "bash scripts/setup.sh"))
