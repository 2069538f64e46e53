"""The fast path on a GPU against diffusers' and PEFT's own layers: gradients, and loss curves of 200 steps.

    python scripts/check_fast.py --gradients     # full size, NF4, 512x512: relative error of all adapter gradients
    python scripts/check_fast.py --curves        # the bundled model: LoRA, rsLoRA and DoRA, plain and fast; CPUs too
    python scripts/check_fast.py --shapes        # full size: several resolutions in turn compile and capture once each
    python scripts/check_fast.py --products      # the bundled model: products in bf16, fp8 and int8, five seeds each

Both paths round to bf16 in places of their own, so each is also held against the same gradients in fp32.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from accelerate import Accelerator
from torch import Tensor
from torch._dynamo.utils import counters

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.device import allocator
from infer.device.allocator import prepare
from infer.fast.cuda_graph import Replay
from infer.fast.install import Memory, choose_path
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from scripts import bench_rows
from scripts.bench_rows import make_row
from scripts.bench_train import Held, make_batch, plain_learner
from scripts.bench_variants import LEAN, NF4, PLAIN, Variant
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.loop.micro_step import make_learner
from train.objective.optim import Optim
from train.run.config import Train
from train.trackers.metrics import read_events
from train.train import train

KINDS = {
    "lora": Adapter(rank=8, alpha=8.0),
    "rslora": Adapter(rank=8, alpha=8.0, rslora=True),
    "dora": Adapter(rank=8, alpha=8.0, dora=True),
}


SEEDS, PRODUCTS = range(5), ("bf16", "fp8", "int8")
SHAPES = (1024, 1024), (832, 1216), (512, 512)  # heights and widths


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    x, y = (torch.cat([each.double().flatten() for each in part]) for part in (a, b))
    return float((x - y).norm() / y.norm())


def gradients(out: Path) -> None:
    """At full size, from one model: the plain path, the fast one eager, and the fast one compiled and captured."""
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    held, seen = Held(device), bench_rows.circumstances(device)
    variant = Variant(NF4, 512, PLAIN, Adapter(rank=4, alpha=4.0))
    transformer, parameters = held.get(variant.job)
    noise = torch.Generator(device).manual_seed(1)
    for parameter in parameters:  # B starts as zero, and then A has no gradient
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise, device=device)
    batch = make_batch(variant, transformer.config, device)

    def taken() -> list[Tensor]:
        found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        assert len(found) == len(parameters)
        for parameter in parameters:
            parameter.grad = None
        return found

    transformer.enable_gradient_checkpointing()
    plain_learner(transformer, variant.job)(batch)
    plain = taken()
    transformer.disable_gradient_checkpointing()
    for name, memory in (
        ("eager", Memory("nothing", compile=False, graph=False)),
        ("compiled", Memory("nothing", graph=False)),
        ("compiled and captured", LEAN),
        ("compiled and captured, attention kept", Memory("attention")),
        ("with products in fp8", Memory("attention")),
        ("with products in int8", Memory("attention")),
    ):
        eight = next((products for products in ("fp8", "int8") if name.endswith(f"in {products}")), "bf16")
        job = replace(variant.job, memory=memory)
        choose_path(transformer, memory, replace(NF4, products=eight), device, print)
        torch.backends.cuda.enable_cudnn_sdp(True)
        learn = make_learner(job, accelerator, transformer, parameters, None)
        for _ in range(3):
            learn(batch)
            found = taken()
        target = "<= 0.01" if eight == "bf16" else None
        row = make_row(f"gradients, fast path {name} against plain", "", relative(found, plain), target, seen)
        bench_rows.append(out, row)
        print(bench_rows.table([row]).splitlines()[-1], flush=True)


def shapes(out: Path) -> None:
    """Three shapes in turn, four times: what the last two rounds compile and capture, and how long they take."""
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    held, seen, captures = Held(device), bench_rows.circumstances(device), []
    capture = Replay._capture

    def counted(self: Replay, form: Any, inputs: Any) -> None:
        captures.append(form)
        capture(self, form, inputs)

    Replay._capture = counted  # type: ignore[method-assign]
    job = Variant(NF4, 1024, Memory()).job
    transformer, parameters = held.get(job)
    choose_path(transformer, job.memory, NF4, device, print)
    learn = make_learner(job, accelerator, transformer, parameters, None)
    batches = [make_batch(Variant(NF4, 1024), transformer.config, device, size) for size in SHAPES]
    seconds: list[list[float]] = []
    allocator.reset_peak(device)
    for turn in range(4):
        if turn == 2:
            graphs, captured = counters["stats"]["unique_graphs"], len(captures)
        seconds.append([])
        for batch in batches:
            start = time.perf_counter()
            learn(batch).tolist()
            seconds[-1].append(time.perf_counter() - start)
    again = counters["stats"]["unique_graphs"] - graphs, len(captures) - captured
    sizes = [f"{width}x{height}" for height, width in SHAPES]
    more = {"shapes": sizes, "seconds": seconds, "compiled": graphs, "captured": captured}
    more |= {"reserved_gib": allocator.peak_reserved(device) / 2**30}
    name = "three resolutions in one run: compiled or captured after two rounds"
    row = make_row(name, "", float(sum(again)), "<= 0", seen, seen=more)
    bench_rows.append(out, row)
    print(bench_rows.table([row]).splitlines()[-1], more, flush=True)


def product_job(products: str, seed: int, steps: int) -> Train:
    return Train(
        model=Model(str(ROOT / "scripts" / "tiny" / "model")),
        precision=Precision("nf4", products=products),
        adapter=KINDS["lora"],
        data=Data(path="runs/check-fast-pictures", resolution=128, batch_size=4),
        optim=Optim(lr=1e-3),
        steps=steps,
        seed=seed,
        validate_every=0,
        save_every=0,
        run=f"check-fast-{products}-{seed}",
    )


def products(out: Path, steps: int) -> None:
    """Losses of the bundled model by how its frozen weights are multiplied, each run in a process of its own."""
    pictures = Path("runs/check-fast-pictures")
    if not (pictures / "metadata.jsonl").is_file():
        make_style(pictures, 36, 0)
    seen = bench_rows.circumstances(Accelerator(mixed_precision="no").device)
    jobs = [product_job(name, seed, steps) for seed in SEEDS for name in PRODUCTS]
    command = [sys.executable, str(Path(__file__).resolve()), "--steps", str(steps), "--one"]

    def trained(job: Train) -> None:
        subprocess.run([*command, job.precision.products, str(job.seed)], check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        list(pool.map(trained, jobs))
    last: dict[str, list[float]] = {name: [] for name in PRODUCTS}
    series: dict[str, list[float]] = {}
    for job in jobs:
        lines = read_events(Path("runs", job.run, "metrics.jsonl"))
        series[f"{job.precision.products} {job.seed}"] = [line["loss"] for line in lines if "loss" in line]
        last[job.precision.products].append([x["validation_loss"] for x in lines if "validation_loss" in x][-1])
    for name in PRODUCTS[1:]:
        ratios = [100 * (a / b - 1) for a, b in zip(last[name], last["bf16"], strict=True)]
        pairs = [(series[f"{name} {seed}"], series[f"bf16 {seed}"]) for seed in SEEDS]
        curve = mean(abs(a / b - 1) for pair in pairs for a, b in zip(*pair, strict=True))
        spread = stdev(ratios) / len(ratios) ** 0.5 * 2.776  # Student's t of five seeds, 95 %
        more = {"by_seed": ratios, "limits": [mean(ratios) - spread, mean(ratios) + spread], "validation": last}
        told = f"products in {name}, {steps} steps, {len(SEEDS)} seeds"
        rows = [
            make_row(f"{told}: validation loss above bf16's, mean", "%", mean(ratios), "<= 0.5", seen, seen=more),
            make_row(f"{told}: distance of losses from bf16's, mean", "%", 100 * curve, None, seen),
        ]
        for row in rows:
            bench_rows.append(out, row)
        print(bench_rows.table(rows), more, flush=True)


def curves(out: Path, steps: int, kinds: list[str]) -> None:
    """Losses by step of the bundled model, plain and fast; each run is a real one of train/train.py."""
    pictures = Path("runs/check-fast-pictures")
    if not (pictures / "metadata.jsonl").is_file():
        make_style(pictures, 36, 0)
    seen = bench_rows.circumstances(Accelerator(mixed_precision="no").device)
    for name in kinds:
        adapter = KINDS[name]
        series = {}
        for path, memory in (("plain", PLAIN), ("fast", Memory())):
            job = Train(
                model=Model(str(ROOT / "scripts" / "tiny" / "model")),
                precision=Precision("nf4"),
                adapter=adapter,
                data=Data(path=str(pictures), resolution=128, batch_size=4),
                optim=Optim(lr=1e-3),
                memory=memory,
                steps=steps,
                validate_every=0,
                save_every=0,
                previews=[],
                run=f"check-fast-{name}-{path}",
            )
            train(job)
            lines = read_events(Path("runs", job.run, "metrics.jsonl"))
            series[path] = [line["loss"] for line in lines if "loss" in line]
            validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
            series[path + " validation"] = validation
        a, b = torch.tensor(series["plain"]), torch.tensor(series["fast"])
        apart = float(((a - b).abs() / a).mean())
        first, last = (series[f"{path} validation"][-1] for path in ("plain", "fast"))
        row = make_row(f"loss curve of {name}, mean distance", "", apart, "<= 0.02", seen, series=series)
        bench_rows.append(out, row)
        row = make_row(f"validation loss of {name} after {steps} steps, fast / plain", "", last / first, None, seen)
        bench_rows.append(out, row)
        print(name, apart, first, last, flush=True)


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # products and seed
    parser.add_argument("--steps", type=int, help="of --curves (200) and of --products (500)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="adapters for --curves")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/check.jsonl"))
    options = parser.parse_args()
    if options.one:
        train(product_job(options.one[0], int(options.one[1]), options.steps))
        return
    if not (options.gradients or options.curves or options.shapes or options.products):
        parser.error("give --gradients, --curves, --shapes or --products")
    if (options.gradients or options.shapes) and not torch.cuda.is_available():
        sys.exit("error: --gradients and --shapes check a GPU, and torch sees none")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.gradients:
        gradients(options.out)
    if options.curves:
        curves(options.out, options.steps or 200, options.kinds)
    if options.shapes:
        shapes(options.out)
    if options.products:
        products(options.out, options.steps or 500)


if __name__ == "__main__":
    main()
