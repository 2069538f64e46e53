"""What selfcheck.py makes of a training's command line; its runs are a slow test (state/test_resume.py)."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from infer.checkpoint.model import Model
from infer.program.command import run_command
from train.run.config import Train
from train.run.names import check_names
from train.selfcheck import KILLED, STEPS, command_of


@pytest.mark.parametrize(
    "given",
    [
        ["sampling.model={second}"],
        ["edits=[{{prompt: make it blue, references: [{second}/0.png]}}]"],
        ["mirror=s3://bucket/runs", "push=me/mine"],
        ["scores_every=1", "stop.drift=0.5", "stop.copying=0.9", "unrelated=[a dog]", "preserve=empty"],
        ["stop.loss=1", "data.validation=0.3", "keep_best=2"],
        ["track=wandb", "track.project=mine", "resume=step-000002", "steps=9", "save_every=5", "keep=1"],
        ["adapter=oft", "memory=fast", "memory.unpacked=true", "deterministic=true", "ema=0.9"],
    ],
)
def test_its_runs_take_what_training_takes(
    given: list[str], tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.path, tmp_path / "second", copy_function=os.symlink)
    (tmp_path / "second/0.png").touch()
    arguments = [one.format(second=tmp_path / "second") for one in given]
    _, script, *options = command_of(arguments, "mine/selfcheck/straight")
    assert Path(script).name == "train.py"
    jobs: list[Train] = []
    monkeypatch.setattr(sys, "argv", [script, *options])
    run_command("train", Train, jobs.append)
    (job,) = jobs
    assert check_names(job) == Path("runs/mine/selfcheck/straight")
    assert (job.steps, job.validate_every, job.resume, job.track.kind) == (STEPS, KILLED, None, "none")
    # nothing is drawn, scored or sent away, and nothing ends the run early
    assert job.previews == [] and not job.edits and not job.scores_every and job.sampling.model is None
    assert job.push is None and job.mirror is None
    assert (job.stop.loss, job.stop.likeness, job.stop.copying, job.stop.drift) == (0, 0, None, None)
