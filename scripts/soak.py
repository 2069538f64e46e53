"""Kill training, cache builds and comparisons at random moments, and see that nothing is lost.

    nice python scripts/soak.py --kills 200
    python scripts/soak.py --kills 3 --seed 1            # a quick look

One process imports the libraries once and forks a child for every start, so that a restart costs a fork and not the
ten seconds of imports; all else is as in a process of its own. A child runs the real command on the bundled model and
gets SIGKILL after a random time, evenly drawn from its start to about the time that a run takes; then the same
command starts again, until it ends by itself. Half of the kills are of training (from the first byte of the cache to
the last of the adapter), a quarter of cache builds, a quarter of comparisons. After every kill what is there must be
whole, and at the end everything must equal the undisturbed run's: the adapter bit for bit, every encoding, every
picture. The last line is one JSON object.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

import torch
from safetensors.torch import load_file

from infer import compare
from infer.program.command import run_command
from infer.report.results import read_results
from scripts.bad.case import inside
from scripts.tiny.make_style import make_style
from train import cache, train
from train.run import config
from train.state.checkpoint import list_checkpoints, read_checkpoint

SET = ["data.path=set", "data.resolution=32", "device=cpu", "precision=bf16", "data.cache=cache"]
TRAIN = [*SET, "run=soak", "steps=3", "save_every=1", "validate_every=2", "validation_levels=1", "adapter.rank=2",
         "accumulation=2", "data.validation=0.2", "data.caption_dropout=0.2", "optim.lr=1e-3",
         "encode.flush_seconds=0", "previews=[]"]  # fmt: skip
CACHE = [*SET, "data.crops=2", "data.flip=true", "encode.flush_seconds=0"]
DRAW = ["run=soak", "device=cpu", "only=[bf16]", "prompts=[a red star]", "sampling.steps=1",
        "sampling.height=32", "sampling.width=32", "text_length=16"]  # fmt: skip


COUNTED = ("kills", "finished", "lost", "differing", "broken", "left")


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


class Soak:
    """The kills of one job."""

    def __init__(self, job: Job, kills: int, rng: random.Random) -> None:
        self.job, self.kills, self.rng = job, kills, rng
        self.counts = Counter[str]()
        self.wrong: list[str] = []

    def undisturbed(self) -> dict[str, str]:
        """The result of a run that nobody kills; it also says how long one takes."""
        began = time.monotonic()
        code = wait(start(self.job))
        assert code == 0, f"{self.job.name} ended with {code} undisturbed: {Path('log.txt').read_text()[-2000:]}"
        self.seconds = time.monotonic() - began
        return self.job.result()

    def run(self) -> None:
        with inside(Path(self.job.name)):
            expected = self.undisturbed()
            clear()
            while self.counts["kills"] < self.kills:
                began = time.monotonic()
                code = wait(start(self.job), self.rng.uniform(0, self.seconds))
                # other work on the machine comes and goes: follow it, so that about half are killed in time
                took = time.monotonic() - began
                self.seconds = 1.1 * self.seconds if code is None else (self.seconds + took) / 2
                if code is None:
                    self.counts["kills"] += 1
                    if self.counts["kills"] % 10 == 0:
                        print(f"{self.job.name}: {self.counts['kills']} kills", flush=True)
                    self.look("after a kill", self.job.check)
                else:
                    self.finish(code, expected)
            self.finish(wait(start(self.job)) or 0, expected)

    def finish(self, code: int, expected: dict[str, str]) -> None:
        """A run came to its end: compare it with the undisturbed one, and begin another."""
        self.counts["finished"] += 1
        if code != 0:
            self.counts["lost"] += 1
            self.wrong.append(f"{self.job.name} ended with {code}: {Path('log.txt').read_text()[-600:]}")
        else:
            self.look("at the end", self.job.check)
            made = self.job.result()
            if made != expected:
                self.counts["differing"] += 1
                other = [name for name in expected.keys() | made.keys() if made.get(name) != expected.get(name)]
                self.wrong.append(f"{self.job.name}: {len(other)} results differ, such as {other[0]}")
            left = [str(path) for path in Path().rglob("*.partial")]
            self.counts["left"] += len(left)
            self.wrong += [f"{self.job.name}: {path} is left over" for path in left]
        clear()

    def look(self, when: str, check: Callable[[], str | None]) -> None:
        try:
            said = check()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if said:
            self.counts["broken"] += 1
            self.wrong.append(f"{self.job.name} {when}: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="train,cache,compare")
    args = parser.parse_args()
    began, figures, wrong = time.monotonic(), Counter[str](), []
    gc.freeze()  # a child's collections need not look at what the imports made
    chosen = [job for job in jobs() if job.name in args.only.split(",")]
    shares = sum(job.share for job in chosen)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, inside(Path(folder)):
        for job in chosen:
            prepare(Path(job.name))
            kills = max(1, round(args.kills * job.share / shares))
            soak = Soak(job, kills, random.Random(f"{args.seed} {job.name}"))
            soak.run()
            figures.update(soak.counts)
            figures[f"{job.name}_kills"] = soak.counts["kills"]
            wrong += soak.wrong
            counts = ", ".join(f"{soak.counts[name]} {name}" for name in COUNTED)
            print(f"{job.name}: {counts}", flush=True)
    for line in wrong:
        print(f"WRONG {line}")
    names = [*COUNTED, *(f"{job.name}_kills" for job in chosen)]
    print(json.dumps({name: figures[name] for name in names} | {"seconds": round(time.monotonic() - began, 1)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
