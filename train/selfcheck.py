"""Prove on this machine, with this config, that a run which is killed ends as one that is not.

    python train/selfcheck.py model=dev precision=nf4 data.path=my_pictures data.resolution=512 run=mine

takes what train.py takes, and trains a few steps of it twice under runs/<run>/selfcheck/: straight on, and in processes
of their own that are killed (SIGKILL) and started again. Then it compares the adapter, its average, the optimizer, the
schedule, all counters and every figure, bit for bit. Where they differ it says in what and by how much, and trains
without a stop once more. If that differs too, the cause is not the resuming: the machine's kernels sum in any order, as
a GPU's do without deterministic=true. The last line is one JSON object; exit code 0: the same, 4:
not. FLUX_LAUNCH="accelerate launch --config_file ..." is put in the place of `python` for the runs on several GPUs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import infer  # noqa: F401  which says what is amiss outside of the environment

import psutil

from infer.program.command import run_command
from infer.program.errors import DIFFERS, DONE
from infer.program.paths import ROOT
from infer.score.judges import UNRELATED
from train.data.references import check_taught
from train.data.samples import check_left, read_samples
from train.run.config import Train
from train.run.names import check_names
from train.trackers.metrics import read_events

STEPS = 6  # of each run
KILLED = 3  # the step in whose journal's line the first kill comes
SAVED = 2  # steps between checkpoints
# nothing is drawn, nothing ends a run early, and nothing leaves this machine
LEFT_OUT = ("previews=[]", "edits=[]", "sampling.model=null", "scores_every=0", "networks=none",
            f"unrelated={json.dumps(UNRELATED)}", "stop.loss=0", "stop.likeness=0", "stop.copying=null",
            "stop.drift=null", "track=none", "push=null", "mirror=null")  # fmt: skip


def command_of(arguments: list[str], run: str) -> list[str]:
    """The training of a few steps with these options under another run's name."""
    launch = shlex.split(os.environ.get("FLUX_LAUNCH", "")) or [sys.executable]
    own = [
        f"run={run}",
        f"steps={STEPS}",
        f"save_every={SAVED}",
        "save_minutes=0",
        f"keep={STEPS}",
        f"validate_every={KILLED}",
        "resume=null",
        *LEFT_OUT,
    ]
    return [*launch, str(ROOT / "train" / "train.py"), *arguments, *own]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl, without seconds and memory."""
    left_out = ("seconds", "memory_gib")
    events = read_events(folder / "metrics.jsonl")
    return [{key: value for key, value in event.items() if key not in left_out} for event in events]


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def refuse_failure(code: int, folder: Path) -> None:
    """Say the end of a run's log, if it failed."""
    if code != 0:
        tail = "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-20:])
        raise ValueError(f"a run of {STEPS} steps ended with exit code {code}; mend what it says first:\n{tail}")


def finish(command: list[str], folder: Path) -> None:
    """Run it to its end.

    Raises:
        ValueError: it failed.
    """
    refuse_failure(start(command, folder).wait(), folder)


def kill_at(command: list[str], folder: Path, step: int) -> int:
    """Run it until it has logged a step, and kill it with all its processes; returns the last step that it logged.

    Raises:
        ValueError: it ended before.
    """
    process = start(command, folder)
    while process.poll() is None and not any(line["step"] >= step for line in lines(folder)):
        time.sleep(0.005)
    if process.returncode is None:
        for each in psutil.Process(process.pid).children(recursive=True):  # a launcher's ranks
            each.kill()
        process.kill()
    code = process.wait()
    if code != -signal.SIGKILL:
        refuse_failure(code, folder)
        raise ValueError(f"the run of {STEPS} steps was over before it could be killed; start the check again")
    return max(int(line["step"]) for line in lines(folder))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested containers as one dictionary of their leaves by path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {name: value}
    return {path: leaf for key, item in pairs for path, leaf in flat(item, f"{name}.{key}".lstrip(".")).items()}


def differences(a: Any, b: Any) -> list[dict[str, Any]]:
    """Each leaf in which two nested containers differ, in bits, and by how much."""
    from torch import Tensor

    one, two = flat(a), flat(b)
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys([*one, *two]):
        x, y = one.get(name), two.get(name)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype:
            by = (x.double() - y.double()).abs()
            if by.any() or x.isnan().any() or y.isnan().any():
                found.append({"what": name, "by": float(by.max()), "values": int((by > 0).sum()), "of": by.numel()})
        elif isinstance(x, Tensor) or isinstance(y, Tensor) or x != y:
            found.append({"what": name, "was": str(x), "is": str(y)})
    return found


def state_of(folder: Path) -> dict[str, Any]:
    """All that a finished run has come to."""
    from train.state.checkpoint import read_checkpoint
    from train.state.steps import list_checkpoints

    adapter, optimizer, state = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return {"adapter": adapter, "optimizer": optimizer, "state": state, "metrics": lines(folder)}


def check(job: Train) -> None:
    """Both runs and their comparison; leaves with the exit code that tells.

    Raises:
        ValueError: a run failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "selfcheck.py starts its runs by itself; start it with python, and for several processes set FLUX_LAUNCH "
            "to what starts them, such as FLUX_LAUNCH='accelerate launch --config_file configs/accelerate/ddp.yaml'"
        )
    folder = check_names(job) / "selfcheck"
    samples, skipped = read_samples(job.data)
    check_left(job.data, samples, skipped)
    check_taught(job.model, job.data, samples)
    from torch import Tensor

    from train.state.steps import list_checkpoints

    shutil.rmtree(folder, ignore_errors=True)
    runs = {name: command_of(sys.argv[1:], f"{job.run}/selfcheck/{name}") for name in ("straight", "killed", "again")}
    print(f"training {STEPS} steps straight on", flush=True)
    finish(runs["straight"], folder / "straight")
    print(f"the same, killed in step {KILLED + 1}", flush=True)
    killed = kill_at(runs["killed"], folder / "killed", KILLED)
    before = [path.name for path in list_checkpoints(folder / "killed" / "checkpoints")]
    print(f"killed after step {killed}, with {', '.join(before)}; starting it again", flush=True)
    finish(runs["killed"], folder / "killed")

    straight = state_of(folder / "straight")
    found = differences(straight, state_of(folder / "killed"))
    tensors = sum(isinstance(leaf, Tensor) for leaf in flat(straight).values())
    result = {"same": not found, "steps": STEPS, "killed_after": killed, "tensors": tensors, "differences": found[:20]}
    if found:
        for one in found[:20]:
            print("differs: " + ", ".join(f"{key} {value}" for key, value in one.items()))
        print("training straight on once more, to see whether that is the same", flush=True)
        finish(runs["again"], folder / "again")
        own = differences(straight, state_of(folder / "again"))
        result["straight_runs_same"] = not own
        where = "two runs that were not killed differ as well: this machine's kernels sum in any order"
        if not job.deterministic:
            where += "; with deterministic=true they do not"
        print(f"differs in {len(found)} places: {where if own else 'resuming is at fault'}; {folder} holds all runs")
    else:
        shutil.rmtree(folder)
        print(f"pass: {tensors} tensors and all figures are the same, bit for bit")
    print(json.dumps(result))
    sys.exit(DIFFERS if found else DONE)


if __name__ == "__main__":
    run_command("train", Train, check)
