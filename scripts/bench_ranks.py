"""Several GPUs at full size: seconds a step and peak memory of FLUX.1-dev with random weights, each way to share it.

    python scripts/bench_ranks.py --ranks 2          # a few minutes; rows into runs/bench/ranks.jsonl
    python scripts/bench_ranks.py --ranks 2 --cpu    # tries it: the bundled model, an eighth of the size, over gloo

Batch 1 a GPU, 512 text tokens, LoRA of rank 4 on attention. A replica's step is timed twice in one process: alone, and
with what the ranks tell each other; the first over the second is the share of linear. FSDP 2's weights are held on the
host, and cut from there; its share of linear is against the replica that was timed alone in the same call.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from infer.adapter.attach import attach
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.device import allocator
from infer.device.device import release
from infer.fast.install import Memory, choose_path
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from scripts.bench_rows import Row, attempt, make_row, read_lines, write_rows
from scripts.bench_train import make_batch
from scripts.bench_variants import BALANCED, BF16, NF4, Variant
from train.data.batches import SampleIndex
from train.loop.micro_step import make_learner
from train.objective.optim import make_optimizer, step_if
from train.ranks.launch import average_gradients, broadcast_adapter, shard_weights
from train.ranks.update import read_update, reduce_update

GIB = 2**30
STEPS = 8  # timed, each way
BUNDLED = str(ROOT / "scripts" / "tiny" / "model")


@dataclass
class Way:
    """One way to train on several GPUs."""

    precision: Precision
    resolution: int
    shared: bool = False
    """Weights, by FSDP 2."""


WAYS = {  # the order in which they are measured: time may be short
    "nf4-1024 replicas": Way(NF4, 1024),
    "nf4-512 replicas": Way(NF4, 512),
    "bf16-1024 FSDP 2": Way(BF16, 1024, shared=True),
    "nf4-1024 FSDP 2": Way(NF4, 1024, shared=True),
    "bf16-1024 replicas": Way(BF16, 1024),
    "bf16-512 FSDP 2": Way(BF16, 512, shared=True),
    "nf4-512 FSDP 2": Way(NF4, 512, shared=True),
    "bf16-512 replicas": Way(BF16, 512),
}


def one_alone(accelerator: Accelerator) -> Any:
    """In an accelerator's place, of a process that has no others."""
    return SimpleNamespace(process_index=0, num_processes=1, device=accelerator.device, reduce=lambda told, _: told)


def seconds_of(step: Callable[[], float], accelerator: Accelerator) -> list[float]:
    """Each step ends with its loss as a number, for which the device's work has to be done."""
    accelerator.wait_for_everyone()
    found = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def measure(way: Way, accelerator: Accelerator) -> Row:
    device, ranks = accelerator.device, accelerator.num_processes
    side = way.resolution if device.type == "cuda" else way.resolution // 8
    variant = Variant(way.precision, side, Memory("nothing") if way.shared else BALANCED)
    job, start = variant.job, time.perf_counter()
    if device.type == "cpu":
        job.model = Model(BUNDLED)
    transformer = load_transformer(
        job.model, job.precision, device, torch.device("cpu") if way.shared else None
    ).train()
    parameters = attach(transformer, job.adapter, job.seed)
    if way.shared:
        shard_weights(transformer, parameters, job, device, accelerator.print)
    job.memory, _ = choose_path(transformer, job.memory, job.precision, device, accelerator.print)
    torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
    release(device)
    result: Row = {"load_seconds": time.perf_counter() - start}
    if device.type == "cuda":
        result["resident_gib"] = torch.cuda.memory_allocated() / GIB
        allocator.reset_peak(device)
    learn = make_learner(job, accelerator, transformer, parameters, None)
    optimizer = make_optimizer(job.optim, parameters)
    broadcast_adapter(parameters, accelerator)
    batch = make_batch(variant, transformer.config, device)

    def step(among: Any) -> float:
        """As train/loop/step.py does."""
        count = among.num_processes
        indices = [[SampleIndex(0, i, i, 0) for i in range(count)]]
        losses = learn(batch)
        average_gradients(parameters, among)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        reduced = reduce_update(among, 1, [losses], norm, False, False)
        step_if(optimizer, reduced.isfinite().all(), norm, 1.0)  # type: ignore[arg-type]
        update = read_update(reduced, count, indices, 1, count)
        optimizer.zero_grad()
        return sum(loss * share for _, loss, share in update.losses)

    start = time.perf_counter()
    for _ in range(3):
        loss = step(accelerator)
    result["warm_up_seconds"] = time.perf_counter() - start
    ways: dict[str, Any] = {"together": accelerator}
    if not way.shared:  # a block's weights are gathered by all
        ways["alone"] = one_alone(accelerator)
    for name, among in ways.items():
        taken = seconds_of(lambda among=among: step(among), accelerator)  # type: ignore[misc]
        of_ranks = gather_object([median(taken)])
        result[name] = max(of_ranks)
        result[f"{name}_of_ranks"] = of_ranks
    if device.type == "cuda":
        result["allocated_gib"] = max(gather_object([allocator.peak(device) / GIB]))
        result["reserved_gib"] = max(gather_object([allocator.peak_reserved(device) / GIB]))
    return result | {"ranks": ranks, "loss": loss}


def worker(names: list[str], out: Path) -> None:
    accelerator = Accelerator(mixed_precision="no")
    main = accelerator.is_main_process
    for name in names:
        line = out if main else out.with_suffix(f".rank{accelerator.process_index}")
        release(accelerator.device)
        attempt(name, line, accelerator.device, lambda name=name: measure(WAYS[name], accelerator))  # type: ignore[misc]
        if main:
            print(f"{name}: {read_lines(out)[-1]}", flush=True)
        accelerator.wait_for_everyone()
    accelerator.end_training()


def rows_of(lines: list[Row], ranks: int, cpu: bool) -> list[Row]:
    rows, where = [], f"{ranks} {'CPU processes, the bundled model' if cpu else 'GPUs'}"
    alone = {line["variant"].split()[0]: line["alone"] for line in lines if "alone" in line}
    for line in lines:
        name = f"train {line['variant']} on {where}"
        line["command"] = f"python scripts/bench_ranks.py --ranks {ranks}{' --cpu' * cpu}"
        if "error" in line:
            rows.append(make_row(name, "s/step", None, None, line, error=line["error"]))
            continue
        seen = {key: value for key, value in line.items() if key not in ("card", "date", "versions", "command")}
        rows.append(make_row(name, "s/step", line["together"], None, line, seen=seen))
        one = alone.get(line["variant"].split()[0])
        if one is not None:
            target = ">= 97" if "alone" in line else None
            rows.append(make_row(f"{name}: of linear", "%", 100 * one / line["together"], target, line))
        for kind in ("allocated", "reserved"):
            if f"{kind}_gib" in line:
                rows.append(make_row(f"{name}, peak {kind} a GPU", "GiB", line[f"{kind}_gib"], None, line))
    return rows


def main() -> None:
    allocator.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of this machine")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--rows", type=Path, default=Path("runs/bench/ranks.jsonl"))
    parser.add_argument("--seconds", type=float, default=500, help="for all of it")
    parser.add_argument("--cpu", action="store_true", help="the bundled model by CPU processes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.only, options.worker)
        return
    if not options.cpu and torch.cuda.device_count() < options.ranks:
        sys.exit(f"error: --ranks {options.ranks} needs as many GPUs, and torch sees {torch.cuda.device_count()}")
    seen = options.rows.with_name(f"{options.rows.stem}-seen.jsonl")
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.write_text("")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    command = [*launch, str(Path(__file__).resolve()), "--worker", str(seen.resolve()), "--only", *options.only]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if options.cpu else {})
    running = subprocess.Popen(command, env=environment)
    try:
        code = running.wait(options.seconds)
    except subprocess.TimeoutExpired:
        running.terminate()  # the launcher, which ends its workers
        code = running.wait()
    lines = read_lines(seen)
    done = {line["variant"] for line in lines}
    for name in options.only:
        if name not in done:
            print(json.dumps({"way": name, "error": f"not measured: the ranks ended with code {code}"}))
    write_rows(rows_of(lines, options.ranks, options.cpu), options.rows)
    sys.exit(1 if code or any("error" in line for line in lines) else 0)


if __name__ == "__main__":
    main()
