"""Training at full size: seconds a step and peak memory with random weights, against the plain recipe.

    python scripts/bench_train.py                                # every variant; a table, and one JSON line a row
    python scripts/bench_train.py --only nf4-1024-balanced reference-nf4-1024 --out rows.jsonl

Batch 1, 512 text tokens, LoRA on attention: FLUX.1-dev with rank 4, FLUX.2's klein and dev with rank 16. The reference
is the recipe of diffusers' example built from the libraries' own parts: NF4 base, PEFT, full checkpointing, bf16
autocast, AdamW8bit, nothing compiled. The matrix limit is the time of the step's matrix products at the rate that a
large bf16 product reaches in the same run.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from accelerate import Accelerator
from torch import Tensor, nn

from infer.adapter.attach import attach
from infer.checkpoint.load import load_transformer
from infer.device import allocator
from infer.device.device import release
from infer.family.flux1_sizes import DEV
from infer.fast.install import choose_path, hold_of, uninstall
from infer.quantize.eight_bit_products import without_products
from infer.quantize.storage import stored_bytes
from scripts import bench_rows
from scripts.bench_gang import alone
from scripts.bench_rows import Row, make_row
from scripts.bench_variants import MEMORY, PROFILED, RATIOS, SECONDS, SLOWER, TEXT, VARIANTS, Variant, need
from train.data.batches import SampleIndex
from train.estimate.flop import step_flop
from train.loop.batch import Batch
from train.loop.micro_step import fit_budget, make_learner
from train.loop.repeat import repeating
from train.objective.flow_matching import Flow, losses, noised, predict
from train.objective.optim import make_optimizer, step_if
from train.ranks.update import read_update, reduce_update
from train.run.config import Train

GIB = 2**30
RATE = "matrix rate, bf16, 8192"
STEPS = 6  # timed, after two that compile and capture and one that replays


def matrix_rate(device: torch.device, size: int = 8192, times: int = 20) -> float:
    """FLOP/s of a bf16 product of random matrices [size, size]."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(5):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        a @ b
    end.record()
    torch.cuda.synchronize(device)
    seconds: float = start.elapsed_time(end) / 1000 / times
    return 2 * size**3 / seconds


def make_batch(variant: Variant, config: Any, device: torch.device, size: tuple[int, int] | None = None) -> Batch:
    """size: height and width in place of the variant's."""
    noise = torch.Generator(device).manual_seed(0)
    height, width = size or (variant.resolution, variant.resolution)
    b = variant.batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, device=device)

    x0, other = (normal(b, config.in_channels // 4, height // 8, width // 8) for _ in range(2))
    embeds = normal(b, TEXT, config.joint_attention_dim)
    pooled = normal(b, config.pooled_projection_dim) if "pooled_projection_dim" in config else None
    sigma, weight = torch.full((b,), 0.5, device=device), torch.full((b,), 1 / b, device=device)
    references = tuple(normal(*x0.shape) for _ in range(variant.references))
    return Batch(x0, other, sigma, embeds, pooled, None, weight, references=references)


def plain_learner(transformer: Any, job: Train) -> Callable[[Batch], Tensor]:
    """The reference's micro-step: autocast, loss, backward."""

    def learn(batch: Batch) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            x = noised(batch.x0, batch.noise, batch.sigma)
            velocity = predict(transformer, x, batch.embeds, batch.pooled, batch.sigma, 1.0, torch.bfloat16)
        loss = losses(velocity, batch.x0, batch.noise, batch.sigma, Flow()).mean()
        loss.backward()
        return loss.detach()

    return learn


class Held:
    """The transformer of the last variant, kept for the next one where it will do."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.key, self.transformer = device, "", None

    def get(self, job: Train) -> tuple[Any, list[nn.Parameter]]:
        key = f"{job.model.path} {without_products(job.precision)} {hold_of(job.memory)}"
        if self.transformer is None or key != self.key or job.memory.budget_gib is not None:
            self.transformer = None
            release(self.device)
            self.transformer = load_transformer(job.model, job.precision, self.device, hold_of(job.memory)).train()
            self.key = key
        else:
            uninstall(self.transformer)
            self.transformer.disable_gradient_checkpointing()
            self.transformer.unload_lora()
        release(self.device)
        return self.transformer, attach(self.transformer, job.adapter, job.seed)


KERNELS = {  # the first that a kernel's name holds
    "attention": ("fmha", "flash", "attention", "sdpa", "cudnn_generated"),
    "dequantize": ("unpack", "kdequant", "dequantize"),
    "matrix products": ("gemm", "with_copies", "nvjet", "cutlass", "xmma", "gemv", "splitk", "cublas"),
    "copies": ("memcpy", "memset"),
    "fused": ("triton", "norm_", "gate_", "heads_", "activation_", "round_rows", "scale_product", "pack"),
    "optimizer": ("multi_tensor", "optimizer", "adam"),
}


def kernel_times(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the device of one step, by what the kernels do."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    times = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in seen.key_averages():
        kernel = event.key.lower()
        kind = next((k for k, parts in KERNELS.items() if any(part in kernel for part in parts)), "other")
        times[kind] += event.self_device_time_total / 1000
    return times


def measure(
    variant: Variant, held: Held, accelerator: Accelerator, name: str = "", gang: Path | None = None, steps: int = STEPS
) -> Row:
    """steps: how many are timed. gang: where other processes are at work too (scripts/bench_gang.py)."""
    device, job = held.device, variant.job
    transformer, parameters = held.get(job)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    allocator.reset_peak(device)
    torch.backends.cuda.enable_cudnn_sdp(True)
    start = time.perf_counter()
    stream = None
    if variant.reference:
        transformer.enable_gradient_checkpointing()
        learn = plain_learner(transformer, job)
    else:
        job.memory, stream = choose_path(transformer, job.memory, job.precision, device, print, job.deterministic)
        torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
        learn = make_learner(job, accelerator, transformer, parameters, stream)
    batch = make_batch(variant, transformer.config, device)
    optimizer: Any = make_optimizer(job.optim, parameters)
    result: Row = {}
    if stream is not None:
        result["resident_blocks"] = fit_budget(job, learn, parameters, optimizer, stream, batch)
        result["host_gib"] = stream.host_bytes / GIB

    indices = [[SampleIndex(0, i, i, 0) for i in range(variant.batch)]]

    def step() -> float:
        losses = learn(batch)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if variant.reference:
            nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
            optimizer.step()
            optimizer.zero_grad()
            return losses.mean().item()
        # as train/loop/step.py does
        reduced = reduce_update(accelerator, variant.batch, [losses], norm, False, False)
        ahead = isinstance(optimizer, torch.optim.AdamW)
        if ahead:
            step_if(optimizer, reduced.isfinite().all(), norm, 1.0)
        update = read_update(reduced, 1, indices, variant.batch, 1)
        if not ahead:
            nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
            optimizer.step()
        optimizer.zero_grad()
        return sum(loss * share for _, loss, share in update.losses)

    for _ in range(3):
        loss = step()
    torch.cuda.synchronize(device)
    result["warm_up_seconds"] = time.perf_counter() - start
    seconds = []
    with alone(gang):
        for _ in range(steps):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            loss = step()
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        if name in PROFILED:
            result["kernel_ms"] = kernel_times(step)
    if gang is None:
        free, total = torch.cuda.mem_get_info(device)
        result["device_gib"] = (total - free) / GIB
    return result | {
        "seconds": median(seconds),
        "spread": [min(seconds), max(seconds)],
        "before_gib": before / GIB,
        "allocated_gib": allocator.peak(device) / GIB,
        "reserved_gib": allocator.peak_reserved(device) / GIB,
        "weights_gib": stored_bytes(transformer) / GIB,
        "adapter_parameters": sum(p.numel() for p in parameters),
        "loss": loss,
    }


def worker(names: list[str], out: Path, gang: Path | None) -> None:
    accelerator = Accelerator(mixed_precision="no")
    held = Held(accelerator.device)

    def work(name: str) -> Row:
        if name == RATE:
            with alone(gang):
                return {"flop_per_second": matrix_rate(held.device)}
        with repeating(VARIANTS[name].deterministic):
            return measure(VARIANTS[name], held, accelerator, name, gang)

    for name in names:
        if not bench_rows.attempt(name, out, held.device, lambda name=name: work(name)):  # type: ignore[misc]
            sys.exit(1)


def need_of(name: str) -> float:
    return 2.0 if name == RATE else need(VARIANTS[name])


def groups(names: list[str]) -> list[list[str]]:
    """Variants of one precision share a process, and so its model; streamed ones have their own, and so have adapters
    that are no LoRA, beside which PEFT attaches none."""
    found: dict[str, list[str]] = {}
    for name in (name for name in names if name != RATE):
        variant = VARIANTS[name]
        shared = f"{variant.model} {without_products(variant.precision)}"
        apart = variant.memory.budget_gib is not None or variant.adapter.kind != "lora"
        key = name if apart else shared
        found.setdefault(key, []).append(name)
    parts, rate = list(found.values()), [name for name in names if name == RATE]
    return [rate + parts[0], *parts[1:]] if parts else [rate]


def rows_of(results: dict[str, Row]) -> list[Row]:
    """What was measured, against what was to be reached."""
    rows, good = [], {}
    for name, found in results.items():
        if "error" in found:
            rows.append(make_row(f"train {name}", "s/step", None, SECONDS.get(name), found, error=found["error"]))
        elif name == RATE:
            rows.append(make_row(name, "TFLOP/s", found["flop_per_second"] / 1e12, None, found))
        else:
            good[name] = found
            own = {key: value for key, value in found.items() if key not in ("card", "date", "versions", "command")}
            rows.append(make_row(f"train {name}", "s/step", found["seconds"], SECONDS.get(name), found, seen=own))
            peaks = f"train {name}, peak allocated", f"train {name}, peak reserved"
            rows.append(make_row(peaks[0], "GiB", found["allocated_gib"], MEMORY.get(name), found))
            bound = MEMORY.get(name) if "resident_blocks" in found else None  # a budget counts what torch holds
            rows.append(make_row(peaks[1], "GiB", found["reserved_gib"], bound, found))
    for name, other, target in RATIOS:
        if name in good and other in good:
            ratio = good[other]["seconds"] / good[name]["seconds"]
            rows.append(make_row(f"train {name}: faster than {other}", "x", ratio, target, good[name]))
    for name, other, bound in SLOWER:
        if name in good and other in good:
            ratio = good[name]["seconds"] / good[other]["seconds"]
            rows.append(make_row(f"train {name}: slower than {other}", "x", ratio, bound, good[name]))
    rate = results.get(RATE, {}).get("flop_per_second")
    if rate:
        for name, kept in (("bf16-1024-fast", False), ("nf4-1024-balanced", True)):
            if name in good:
                flop = step_flop(DEV["transformer"], 1024**2, TEXT, recomputed=kept, kept=kept)
                share = 100 * flop / rate / good[name]["seconds"]
                wanted = None if kept else ">= 65"
                rows.append(make_row(f"train {name}: of the matrix limit", "%", share, wanted, good[name]))
    return rows


if __name__ == "__main__":
    names = [RATE, *VARIANTS]
    bench_rows.command(Path(__file__), __doc__ or "", names, groups, worker, rows_of, need_of)
