"""The commands that are killed or meet faults, as forks of one process, and how to see that their files are whole."""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from infer import compare
from infer.program.command import run_command
from infer.report.results import read_results
from scripts.tiny.make_style import make_style
from train import cache, train
from train.run import config
from train.state.checkpoint import read_checkpoint
from train.state.steps import list_checkpoints

SET = ["data.path=set", "data.resolution=32", "device=cpu", "precision=bf16", "data.cache=cache"]
TRAIN = [*SET, "run=soak", "steps=3", "save_every=1", "validate_every=2", "validation_levels=1", "adapter.rank=2",
         "accumulation=2", "data.validation=0.2", "data.caption_dropout=0.2", "optim.lr=1e-3",
         "encode.flush_seconds=0", "previews=[]"]  # fmt: skip
CACHE = [*SET, "data.crops=2", "data.flip=true", "encode.flush_seconds=0"]
DRAW = ["run=soak", "device=cpu", "only=[bf16]", "prompts=[a red star]", "sampling.steps=1",
        "sampling.height=32", "sampling.width=32", "text_length=16"]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command that is killed."""

    name: str
    share: int
    """Of each 4 kills."""
    run: Callable[[], Any]
    check: Callable[[], str | None]
    """Looks at what is there after a kill, in the job's folder; says what is wrong."""
    result: Callable[[], dict[str, str]]
    """What a finished run has made: a hash by name."""


def _command(name: str, schema: type[Any], work: Callable[[Any], Any], arguments: list[str]) -> None:
    sys.argv = [f"{name}.py", *arguments]
    run_command(name, schema, work)


def check_run() -> str | None:
    """A run's newest checkpoint is whole, and so is its adapter if it is there."""
    run = Path("runs/soak")
    for path in list_checkpoints(run / "checkpoints"):
        try:
            read_checkpoint(path)
        except ValueError as error:
            return str(error)
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    if file.exists() and not _hash_tensors([file]):
        return f"{file} holds nothing"
    return None


def check_shards() -> str | None:
    """Every shard of the cache can be read."""
    _hash_tensors([*Path("cache").rglob("[!.]*.safetensors")])
    marks = [*Path("cache").rglob("*.damaged")]
    return f"{marks[0]} is marked as damaged" if marks else None


def check_comparison() -> str | None:
    """A comparison is whole or absent."""
    folder = Path("runs/soak/compare")
    if not folder.exists():
        return None
    rows = read_results(folder / "results.json").rows
    absent = [row.image for row in rows if not (folder / row.image).is_file()]
    absent += [name for name in ("report.html", "report.md", "comparison.png") if not (folder / name).is_file()]
    return f"{absent[0]} is absent" if absent else None


def _hash_tensors(files: list[Path], skip: str = "/none") -> dict[str, str]:
    """Each tensor by its name: in a cache the key and the part, wherever it lies."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for file in files
        if skip not in str(file)
        for name, tensor in load_file(file).items()
    }


def made_adapter() -> dict[str, str]:
    """The adapter file as bytes, and every step's loss."""
    run = Path("runs/soak")
    adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = ("loss", "validation_loss")
    own = {f"{line['step']}/{key}": str(line[key]) for line in losses for key in kinds if key in line}
    return {"adapter": hashlib.sha256(adapter.read_bytes()).hexdigest(), **own}


def made_encodings() -> dict[str, str]:
    return _hash_tensors([*Path("cache").rglob("[!.]*.safetensors")], "/index/")


def made_pictures() -> dict[str, str]:
    images = Path("runs/soak/compare/images")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in images.iterdir()}


def jobs() -> list[Job]:
    return [
        Job("train", 2, partial(_command, "train", config.Train, train.train, TRAIN), check_run, made_adapter),
        Job("cache", 1, partial(_command, "cache", cache.Fill, cache.fill, CACHE), check_shards, made_encodings),
        Job("compare", 1, partial(_command, "compare", compare.Compare, compare.compare, DRAW), check_comparison,
            made_pictures),
    ]  # fmt: skip


for _name in ("infer.comparison.draw", "train.latents.build", "train.loop.run"):  # once, not in every child
    importlib.import_module(_name)


def start(job: Job) -> int:
    """Fork a child that runs the command in the working folder; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        job.run()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """The exit code of a child; None, and the child is killed, if it runs longer."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else None
        done, status = os.waitpid(pid, os.WNOHANG if end is not None else 0)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True)
    make_style(folder / "set", 5, seed=1)


def clear() -> None:
    """Forget a finished run."""
    for made in (Path("runs"), Path("cache")):
        shutil.rmtree(made, ignore_errors=True)
