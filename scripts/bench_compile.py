"""How long first calls take, compilation included: in a process that finds nothing compiled, and in the next one.

    python scripts/bench_compile.py                         # training, at full size with random weights
    python scripts/bench_compile.py --work sampling         # pictures at two precisions, without and with an adapter
    python scripts/bench_compile.py --tiny                  # with the bundled model

Each way of working runs in two processes that share a folder of compiled code, which is empty before the first.
Seconds are of the calls, once the model is loaded. Prints a table, and writes one JSON line a call.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import ready

    ready()

from accelerate import Accelerator
from torch import Tensor, nn
from torch._dynamo.utils import counters

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.adapter.switch import switch
from infer.checkpoint.files import read_config
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.fast.cuda_graph import Sampler
from infer.fast.install import choose_path
from infer.fast.kernel_calls import Use
from infer.fast.memory import Memory
from infer.fast.ready_kernels import prepare_kernels
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision
from scripts import bench_rows
from scripts.bench_rows import make_row
from scripts.bench_train import make_batch
from scripts.bench_variants import NF4, Variant
from train.loop.batch import Batch
from train.loop.micro_step import batch_losses, make_learner
from train.objective.flow_matching import Flow, predict
from train.run.config import Train

TINY = Model("scripts/tiny/model")
PROCESSES = ("first process", "second process")
TARGETS = dict(zip(PROCESSES, ("<= 12", "<= 4"), strict=True))  # seconds until the first step is done, after loading


class Clock:
    """Times calls; keeps what each compiled."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, []  # type: tuple[torch.device, list[bench_rows.Row]]

    def time(self, name: str, call: Callable[[], object]) -> None:
        before, start = int(counters["stats"]["unique_graphs"]), time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.rows.append({"call": name, "seconds": seconds, "graphs": int(counters["stats"]["unique_graphs"]) - before})
        print(f"{name:40} {seconds:8.2f} s", flush=True)


def _shape(tiny: bool) -> tuple[Variant, list[tuple[str, int, tuple[int, int]]]]:
    """The variant, and further shapes: what is other about them, batch, height and width."""
    sides = (128, 96, 160) if tiny else (1024, 832, 1216)
    variant = Variant(NF4, sides[0])
    return variant, [("another size", 1, sides[1:]), ("another batch", 2, (sides[0] // 2, sides[0] // 2))]


def training(tiny: bool, clock: Clock) -> None:
    accelerator = Accelerator(mixed_precision="no")
    device, (variant, others) = accelerator.device, _shape(tiny)
    job: Train = variant.job
    if tiny:
        job.model = TINY
    found: dict[str, Any] = {}
    config = read_config(job.model, "transformer")
    prepare_kernels(config, job.precision, job.memory, device, Use(job.adapter.rank, learns=True))

    def load() -> None:
        transformer = load_transformer(job.model, job.precision, device).train()
        parameters = attach(transformer, job.adapter, job.seed)
        job.memory, _ = choose_path(transformer, job.memory, job.precision, device, print)
        found.update(transformer=transformer, parameters=parameters)

    clock.time("loading", load)
    transformer, parameters = found["transformer"], found["parameters"]
    torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
    learn = make_learner(job, accelerator, transformer, parameters, None)
    batch = make_batch(variant, transformer.config, device)

    def validate(given: Batch) -> None:
        with torch.no_grad():
            batch_losses(transformer, given, job, Flow())

    def step(given: Batch) -> None:
        learn(given)
        for parameter in parameters:
            parameter.grad = None

    clock.time("validation", lambda: validate(batch))
    for call in ("first step", "second step, captured", "third step"):
        clock.time(call, lambda: step(batch))
    for name, count, size in others:
        other = make_batch(Variant(NF4, size[0], batch=count), transformer.config, device, size)
        clock.time(f"first step, {name}", lambda other=other: step(other))  # type: ignore[misc]
        clock.time(f"second step, {name}", lambda other=other: step(other))  # type: ignore[misc]
    clock.time("validation again", lambda: validate(batch))
    switch(transformer, False)
    clock.time("preview without the adapter", lambda: validate(batch))
    switch(transformer, True)


def sampling(tiny: bool, clock: Clock) -> None:
    device, (variant, _) = clock.device, _shape(tiny)
    model = TINY if tiny else variant.job.model
    for kind in ("nf4", "fp4", "int8"):
        precision = Precision(kind)
        prepare_kernels(read_config(model, "transformer"), precision, Memory(), device)
        transformer: Any = load_transformer(model, precision, device)
        memory, offload = choose_path(transformer, Memory(), precision, device, print)
        if memory.graphs(device):
            Sampler(transformer, offload)
        batch = make_batch(variant, transformer.config, device)

        def call(transformer: Any = transformer, batch: Batch = batch) -> Tensor:
            with torch.no_grad():
                if isinstance(transformer.forward, Sampler):
                    transformer.forward.refresh()
                dtype = compute_dtype_of(transformer)
                return predict(transformer, batch.x0, batch.embeds, batch.pooled, batch.sigma, 3.5, dtype)

        for name in (kind, f"{kind} with an adapter"):
            if name != kind:
                parameters: list[nn.Parameter] = attach(transformer, Adapter(rank=16), 0)
                for parameter in parameters:
                    parameter.requires_grad_(False).add_(0.001)
            for which in ("first", "second", "third"):
                clock.time(f"{name}, {which} call", call)
        del transformer, call, batch
        release(device)


WORK = {"training": training, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, default="training")
    parser.add_argument("--tiny", action="store_true", help="the bundled model")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/compile.jsonl"))
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is None:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "TRITON_CACHE_DIR": f"{folder}/triton",
            }
            for process in PROCESSES:
                command = [sys.executable, *sys.argv, "--process", process]
                subprocess.run(command, env=environment, check=True)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, seen = Clock(device), bench_rows.circumstances(device)
    WORK[options.work](options.tiny, clock)
    if options.work == "training":
        first = ("validation", "first step")
        total = sum(row["seconds"] for row in clock.rows if row["call"] in first)
        target = TARGETS.get(options.process)
        clock.rows.append({"call": " and ".join(first), "seconds": total, "graphs": 0, "target": target})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    what = f"{options.work}{', bundled model' if options.tiny else ''}, {options.process}"
    for row in clock.rows:
        line = make_row(f"{what}: {row['call']}", "s", row["seconds"], row.get("target"), seen, graphs=row["graphs"])
        bench_rows.append(options.out, line)


if __name__ == "__main__":
    main()
