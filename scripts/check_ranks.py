"""Several GPUs against one: the same adapter from a larger batch, shared weights and optimizers, a run that one process
goes on with, one that repeats itself, what is said, and the death of a rank.

    python scripts/check_ranks.py                  # two GPUs, a minute; --cpu tries it with two CPU processes
    python scripts/check_ranks.py --ranks 4 --out runs/bench/check_ranks.jsonl

Trains the bundled model for a few steps in each way, by several processes with a part of the batch each and by one, and
prints one JSON object a line: `difference` is that of the adapters over what was learned, `limit` what rounding
explains. The exit code is 4 if any is beyond its limit.
"""

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
STEPS, SAVED = 4, 2
RESUMED, REPEATED = "resumed by one", "deterministic"
ENDING = 15  # seconds that processes have after their time is up
TOOK = "took"  # a file in a run's folder


@dataclass
class Check:
    """One way to train, and how much of what is learned may differ from one process's."""

    precision: str
    limit: float
    """Adam divides by small second moments, so that bf16 in batches of other sizes is seen."""
    optimizer: str = "adamw"
    memory: dict[str, Any] = field(default_factory=dict)
    launch: str = "ddp"
    """ddp, fsdp2 or zero2, as in configs/accelerate."""
    deterministic: bool = False


GRAPH = {"graph": None}  # the default, captured on CUDA
CHECKS = {
    "replicas fp32": Check("fp32", 1e-3),
    "replicas nf4": Check("nf4", 0.1),
    "replicas nf4, CUDA graph": Check("nf4", 0.1, memory=GRAPH),
    "replicas int8": Check("int8", 0.1),
    "replicas nf4, adamw8bit": Check("nf4", 0.2, "adamw8bit"),
    f"replicas nf4, {REPEATED}": Check("nf4", 0.1, memory=GRAPH, deterministic=True),
    "fsdp2 nf4": Check("nf4", 0.1, launch="fsdp2"),
    "fsdp2 bf16": Check("bf16", 0.1, launch="fsdp2"),
    f"fsdp2 nf4, {REPEATED}": Check("nf4", 0.1, launch="fsdp2", deterministic=True),
    "zero2 nf4": Check("nf4", 0.1, launch="zero2"),
}
LAUNCHES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}


def checks(cpu: bool) -> dict[str, Check]:
    """Those that this machine can make."""
    zero = find_spec("deepspeed") is not None
    possible = {name: check for name, check in CHECKS.items() if zero or check.launch != "zero2"}
    return {name: check for name, check in possible.items() if not (cpu and check.memory and not check.deterministic)}


def job_of(name: str, processes: int, cpu: bool) -> Any:
    """The run of one check."""
    from infer.adapter.lora import Adapter
    from infer.checkpoint.model import Model
    from infer.fast.install import Memory
    from infer.quantize.precision import Precision
    from infer.sample.generate import Sampling
    from train.data.dataset import Data
    from train.objective.optim import Optim
    from train.run.config import Train

    check = CHECKS[name]
    compute = "fp32" if check.precision == "fp32" else "bf16"
    return Train(
        model=Model(str(ROOT / "scripts/tiny/model")),
        precision=Precision(check.precision, compute_dtype=compute),
        adapter=Adapter(
            rank=32 if check.optimizer == "adamw8bit" else 4
        ),  # it leaves tensors below 4,096 values in fp32
        data=Data("pictures", 128, 4 // processes, validation=0.2, cache="cache"),
        optim=Optim(check.optimizer, lr=1e-3),
        memory=Memory(
            **{"compile": False, "graph": False} | check.memory
        ),  # compilation takes longer than all the rest
        run=f"{name.replace(', ', '-').replace(' ', '-')}-{processes}",
        deterministic=check.deterministic,
        steps=STEPS,
        accumulation=2,
        save_every=SAVED,
        validate_every=0,
        validation_levels=2,
        previews=["a red star"] if check.deterministic else [],
        sampling=Sampling(steps=1, height=64, width=64),
        device="cpu" if cpu else "cuda",
    )


def launch_as(way: str) -> None:
    """As `accelerate launch` does for a config file of configs/accelerate."""
    for name in {name for values in LAUNCHES.values() for name in values}:
        os.environ.pop(name, None)
    os.environ |= LAUNCHES[way]


def again(run: str) -> None:
    """Set a finished run back to its first checkpoint, and what came out of it aside."""
    folder = Path("runs", run)
    shutil.copytree(folder / "adapter", f"runs/{run}-first/adapter", dirs_exist_ok=True)
    for name in ("metrics.jsonl", TOOK):
        shutil.copy(folder / name, f"runs/{run}-first")
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:06d}")


def timed(job: Any, train: Any) -> None:
    """Train, and note in the run's folder and in the log how long that took with all that comes before and after."""
    start = time.monotonic()
    train(job)
    took = time.monotonic() - start
    if os.environ.get("RANK", "0") == "0":
        Path("runs", job.run, TOOK).write_text(f"{took:.1f}")
        print(f"==== {job.run}: {took:.1f} s", flush=True)


def train_all(cpu: bool, ranks: int, until: float) -> None:
    """What each process of a launch does: every check, one after another. One process by itself goes on with a run of
    the others too, once they have ended. until: the time at which one that is not done says where it is, and ends."""
    faulthandler.dump_traceback_later(max(1.0, until - time.time()), exit=True)
    from infer.program.quiet import quieten

    quieten()
    from accelerate import Accelerator

    from train.train import train

    setattr(Accelerator, "end_training", lambda self: None)  # noqa: B010 - the next check needs the process group
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name, check in checks(cpu).items():
        job = job_of(name, processes, cpu)
        if check.launch == "fsdp2" and processes == 1:
            job.memory.fused = False  # as FSDP has it
        launch_as(check.launch if processes > 1 else "ddp")
        timed(job, train)
        if check.deterministic and processes > 1:
            torch.distributed.barrier()
            if os.environ["RANK"] == "0":
                again(job.run)
            torch.distributed.barrier()
            timed(job, train)
    launch_as("ddp")
    if processes == 1:
        while not Path("ended").is_file():  # the ranks, which were started beside this process
            time.sleep(0.1)
        job = job_of("replicas nf4", ranks, cpu)
        again(job.run)
        timed(job, train)
        return
    loop: Any = sys.modules["train.loop.step"]

    def dies(*_: Any) -> None:
        if os.environ["RANK"] == "1":
            Path("died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    loop.training_batch = dies
    job = job_of("replicas nf4", processes, cpu)
    job.run = "death"
    train(job)


def compare(name: str, one: str, other: str, limit: float) -> dict[str, Any]:
    """The adapters of two runs; limit: 0 asks for the same bits."""
    from safetensors.torch import load_file

    runs = Path("runs", one), Path("runs", other)
    mine, theirs = (load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in runs)
    moved = sum(float(value.square().sum()) for key, value in mine.items() if "lora_B" in key) ** 0.5
    difference = sum(float((mine[key] - theirs[key]).square().sum()) for key in mine) ** 0.5 / moved
    events = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    last = [[event for event in of_run if "seconds" in event][-1] for of_run in events]
    return {
        "check": name,
        "difference": difference,
        "limit": limit,
        "ok": difference < limit if limit else difference == 0 and moved > 0,
        "seconds": [round(event["seconds"], 4) for event in last],
        "gib": [round(event["memory_gib"], 3) for event in last],
        "took": [float((run / TOOK).read_text()) for run in runs],
    }


def said(log: str, cpu: bool) -> dict[str, Any]:
    """What the ranks wrote: no library's warning, and each note of ours once, not once a rank."""
    expected = sum(check.launch == "fsdp2" for check in checks(cpu).values())
    notes = log.count("note: the fast path is off: it holds a block's weights in one piece")
    warnings = [line.strip() for line in log.splitlines() if re.search(r"Warning\b|^\[?W\d{4}|context_fn", line)]
    ours = [line for line in warnings if "torch/distributed/" not in line]  # the launcher's own, of the one that dies
    return {"check": "messages", "notes": notes, "warnings": ours[:5], "ok": notes == expected and not ours}


def results(cpu: bool, ranks: int, log: str, ended: float) -> Iterator[dict[str, Any]]:
    for name, check in checks(cpu).items():
        one, several = (job_of(name, count, cpu).run for count in (1, ranks))
        pairs = [(name, one, several, check.limit)]
        if check.deterministic:
            pairs = [
                (name, one, f"{several}-first", check.limit),
                (f"{name}: stopped", f"{several}-first", several, 0.0),
            ]
        if name == "replicas nf4":
            pairs = [(name, one, f"{several}-first", check.limit)]
            pairs += [(f"{name}: {RESUMED}", f"{several}-first", several, check.limit)]
        for pair in pairs:
            try:
                yield compare(*pair)
            except OSError as error:
                yield {"check": pair[0], "ok": False, "error": str(error)}
    yield said(log, cpu)
    told = log.count(f"rank 1 of {ranks} has ended before the work was done")
    death: dict[str, Any] = {"check": "death of a rank", "ok": False, "error": "the ranks did not come so far"}
    if Path("died").is_file():
        seconds = round(ended - float(Path("died").read_text()), 1)
        death = {"check": "death of a rank", "seconds": seconds, "told": told, "ok": told == 1}
    yield death


def row_of(result: dict[str, Any], ranks: int, place: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a result, as scripts/bench_rows.py has it: the difference as a part of its limit."""
    from scripts.bench_rows import make_row

    more = {key: value for key, value in result.items() if key != "check"}
    measured: float | None = None
    if "error" not in result:
        measured = result["difference"] / result["limit"] if result.get("limit") else 0.0 if result["ok"] else 1e9
    source = place | {"command": f"python scripts/check_ranks.py --ranks {ranks}"}
    return make_row(f"{result['check']}, {ranks} ranks", "of its limit", measured, "<= 1", source, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="CPU processes over gloo")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2, help="processes, a GPU each")
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument("--logs", type=Path, help="where what the processes say is kept; runs/check_ranks")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    parser.add_argument("--worker", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_all(options.cpu, options.ranks, options.worker)
        return
    from infer.program.quiet import quieten

    quieten()
    from scripts.bench_rows import append, circumstances
    from scripts.tiny.make_style import make_style

    if not options.cpu and torch.cuda.device_count() < options.ranks:
        sys.exit(
            f"error: {options.ranks} GPUs are needed, and torch sees {torch.cuda.device_count()}; --cpu needs none"
        )
    started = time.time()
    own = [str(Path(__file__).resolve()), "--worker", str(started + options.seconds), "--ranks", str(options.ranks)]
    own += ["--cpu"] if options.cpu else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"} if options.cpu else {}
    out = options.out.resolve() if options.out else None
    logs = (options.logs or Path("runs/check_ranks")).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make_style(Path("pictures"), 12, seed=1)
        several = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        running = []
        for log, command in ((logs / "ranks.log", several), (logs / "one.log", [sys.executable])):
            with log.open("w") as stream:
                running.append(subprocess.Popen([*command, *own], env=environment, stdout=stream, stderr=stream))
        for process in running:
            try:
                process.wait(max(1.0, started + options.seconds + ENDING - time.time()))
            except subprocess.TimeoutExpired:
                print(f"the processes have not ended {ENDING} s after {options.seconds:g} s", file=sys.stderr)
                process.terminate()
                process.wait()
            if process is running[0]:
                ended = time.time()
                Path("ended").touch()
        code, told = running[1].returncode, (logs / "ranks.log").read_text()
        if code:
            print(f"one process said:\n{(logs / 'one.log').read_text()[-4000:]}", file=sys.stderr)
        place = circumstances(torch.device("cpu" if options.cpu else "cuda"))
        found = list(results(options.cpu, options.ranks, told, ended))
        for result in found:
            print(json.dumps(result))
            if out is not None:
                append(out, row_of(result, options.ranks, place))
        if code or not all(result["ok"] for result in found):
            print(f"{options.ranks} processes said:\n{told[-6000:]}", file=sys.stderr)
            sys.exit(4)


if __name__ == "__main__":
    main()
