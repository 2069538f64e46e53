"""The trainings of scripts/check_ranks.py, and what each process of a launch does: all of them, one after another."""

import faulthandler
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from infer.program.paths import ROOT

STEPS, SAVED = 4, 2
RESUMED, REPEATED = "resumed by one", "deterministic"
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
