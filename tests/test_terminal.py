"""The first hour on a terminal: no traceback and no warning, and each command ends in a sentence.

Training and comparison start once as processes of their own, whose imports must be silent too; their second runs are
forked."""

import re
import sys
from pathlib import Path

import pytest

from infer.program.errors import INTERRUPTED, STOPPED
from infer.program.paths import ROOT
from scripts.tiny.make_style import make_style
from tests.terminal import watch

PYTHON = sys.executable
TRAIN = [
    PYTHON, str(ROOT / "train/train.py"), "experiment=demo", "run=first", "data.path=pictures", "data.resolution=64",
    "data.batch_size=2", "memory.keep=nothing", "adapter.rank=2", "validate_every=0", "validation_levels=1",
    "sampling.steps=2", "sampling.height=64", "sampling.width=64",
]  # fmt: skip
COMPARE = [
    PYTHON, str(ROOT / "infer/compare.py"), "run=first", "adapter.path=runs/first/adapter", "sampling.steps=2",
    "sampling.height=64", "sampling.width=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first hour")
    make_style(folder / "pictures", 10, seed=0)
    return folder


def test_a_training_that_is_stopped_and_gone_on_with(place: Path) -> None:
    stopped = watch([*TRAIN, "steps=400"], place, interrupt_after=" 3/400")
    assert stopped.code == STOPPED and not stopped.alarming, stopped.text
    assert stopped.lines[-1] == "stopped (SIGINT); its state is saved, the same command goes on"
    step = int(re.findall(r" (\d+)/400", stopped.text)[-1])
    resumed = watch([*TRAIN[1:], f"steps={step + 2}"], place, forked=True)
    assert resumed.code == 0 and not resumed.alarming, resumed.text
    assert f"resuming at step {step} of {step + 2}" in resumed.lines


def test_a_comparison_and_one_that_is_stopped(place: Path) -> None:
    stopped = watch([*COMPARE[1:], "sampling.steps=400"], place, interrupt_after="bf16", forked=True)
    assert stopped.code == INTERRUPTED and not stopped.alarming, stopped.text
    assert stopped.lines[-1] == "stopped by Ctrl-C; nothing half-written is left, the same command starts again"
    assert not list((place / "runs/first").rglob("*.partial"))
    done = watch([*COMPARE, "only=[bf16,nf4]"], place)
    assert done.code == 0 and not done.alarming, done.text


@pytest.mark.slow
def test_the_demo() -> None:
    """The whole of it, in the repository: what is done already is not done again."""
    for _ in range(2):
        seen = watch(["bash", "scripts/demo.sh"], ROOT, seconds=900)
        assert seen.code == 0 and not seen.alarming, seen.text
        assert seen.lines[-1] == "pictures during training: runs/demo/previews"
