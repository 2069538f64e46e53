"""Peak memory of many training configs at full size: what train/plan.py is compared with.

    python scripts/bench_grid.py --card-gib 78 --out tests/plan_grid.jsonl

Configs are run side by side as far as the card holds them, so their seconds mean nothing and are not recorded. A config
takes two steps that compile and capture and two that replay, on batches of the largest size.
"""

import argparse
import sys
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from accelerate import Accelerator

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.device.allocator import prepare
from infer.fast.install import Memory
from infer.quantize.precision import Precision
from scripts import bench_rows
from scripts.bench_rows import Row
from scripts.bench_train import Held, measure
from scripts.bench_variants import BF16, FLUX2, INT8, NESTED, NF4, Variant, need
from train.data.dataset import Data
from train.objective.optim import Optim
from train.run.config import Train

FP4 = Precision("fp4")
MLP, EVERY = "attention+mlp", "all"


def _config(
    precision: Precision,
    resolution: int,
    batch: int = 1,
    keep: str = "attention",
    rank: int = 16,
    targets: str = "attention",
    optim: str = "adamw",
    budget: float | None = None,
    fused: bool = True,
    dora: bool = False,
    model: str = "FLUX.1-dev",
) -> Variant:
    memory = Memory(keep, fused=fused, budget_gib=budget)
    adapter = Adapter(rank=rank, targets=targets, dora=dora)
    return Variant(precision, resolution, memory, adapter, optim, batch, model=model)


_number = count()
CONFIGS: dict[str, Variant] = {
    f"{next(_number):02d}": each
    for each in (
        _config(NF4, 1024, rank=4),
        _config(NF4, 1024, keep="nothing", rank=4),
        _config(NF4, 512, rank=4),
        _config(NF4, 512, keep="nothing", rank=4),
        _config(NF4, 512, batch=4),
        _config(NF4, 768, keep="products"),
        _config(NF4, 768, rank=64, targets=MLP),
        _config(NF4, 512, keep="everything", rank=4),
        _config(NF4, 512, batch=4, keep="nothing", rank=64),
        _config(NF4, 1024, batch=2),
        _config(NF4, 768, keep="nothing", targets=EVERY),
        _config(NF4, 512, batch=2, rank=4, optim="adamw8bit"),
        _config(NF4, 768, dora=True),
        _config(NF4, 512, batch=2, keep="products"),
        _config(NF4, 1024, batch=2, keep="nothing", rank=128),
        _config(NESTED, 1024, keep="nothing", rank=4),
        _config(NESTED, 512),
        _config(NESTED, 512, batch=4, rank=64, targets=MLP),
        _config(FP4, 768, batch=2),
        _config(INT8, 1024, rank=4),
        _config(INT8, 1024, keep="nothing"),
        _config(INT8, 512, batch=4),
        _config(INT8, 512, keep="nothing", rank=64),
        _config(INT8, 768, targets=MLP),
        _config(BF16, 1024),
        _config(BF16, 512, keep="everything"),
        _config(BF16, 768, batch=2, keep="nothing"),
        _config(BF16, 512, keep="products", rank=64),
        _config(NF4, 1024, keep="nothing", fused=False),
        _config(NF4, 512, batch=2, keep="nothing", fused=False, optim="adamw8bit"),
        _config(INT8, 768, keep="nothing", fused=False),
        _config(BF16, 512, keep="nothing", fused=False, targets=MLP),
        _config(NF4, 1024, keep="nothing", rank=4, budget=5.0),
        _config(NF4, 1024, budget=8.0),
        _config(NF4, 512, keep="nothing", rank=4, budget=3.0),
        _config(INT8, 1024, keep="nothing", budget=8.0),
        _config(BF16, 512, budget=12.0),
        _config(NF4, 1024, keep="products", rank=4),
        _config(NF4, 512, keep="everything", batch=2),
        *(
            _config(NF4, size, keep=keep, model=FLUX2["klein4b"])
            for keep in ("attention", "nothing", "everything")
            for size in (1024, 512)
        ),
        _config(INT8, 1024, model=FLUX2["klein4b"]),
        _config(BF16, 512, model=FLUX2["klein4b"]),
        _config(NF4, 1024, keep="nothing", budget=4.0, model=FLUX2["klein4b"]),
        _config(NESTED, 512, keep="nothing", rank=64, targets=MLP, model=FLUX2["klein4b"]),
        _config(NF4, 1024, model=FLUX2["klein9b"]),
        _config(NF4, 512, keep="nothing", model=FLUX2["klein9b"]),
        _config(NF4, 512, keep="everything", model=FLUX2["klein9b"]),
        _config(NF4, 1024, model=FLUX2["flux2_dev"]),
        _config(NF4, 512, keep="nothing", model=FLUX2["flux2_dev"]),
        _config(NF4, 1024, keep="nothing", budget=20.0, model=FLUX2["flux2_dev"]),
    )
}


def groups(names: list[str], most: int) -> list[list[str]]:
    """Up to `most` configs of one precision a process, which loads its weights once."""
    found: list[list[str]] = []
    for name in names:
        variant = CONFIGS[name]
        mine = [
            group
            for group in found
            if CONFIGS[group[0]].precision == variant.precision
            and CONFIGS[group[0]].model == variant.model
            and CONFIGS[group[0]].memory.budget_gib is None
            and variant.memory.budget_gib is None
            and len(group) < most
        ]
        if mine:
            mine[0].append(name)
        else:
            found.append([name])
    return found


def describe(variant: Variant) -> Row:
    job = variant.job
    parts: Row = {name: asdict(getattr(job, name)) for name in ("precision", "adapter", "memory")}
    parts["model"] = job.model.path
    return {**parts, "optim": job.optim.name, "resolution": variant.resolution, "batch_size": variant.batch}


def job_of(config: Row) -> Train:
    """What `describe` described."""
    return Train(
        model=Model(config.get("model", "black-forest-labs/FLUX.1-dev"), weights="random"),
        precision=Precision(**config["precision"]),
        adapter=Adapter(**config["adapter"]),
        memory=Memory(**config["memory"]),
        optim=Optim(name=config["optim"]),
        data=Data(resolution=config["resolution"], batch_size=config["batch_size"]),
    )


def worker(names: list[str], out: Path) -> None:
    accelerator = Accelerator(mixed_precision="no")
    held = Held(accelerator.device)

    def work(name: str) -> Row:
        seen = measure(CONFIGS[name], held, accelerator, steps=1)
        for meaningless in ("seconds", "spread", "device_gib", "warm_up_seconds"):
            seen.pop(meaningless)
        return {"config": describe(CONFIGS[name]), **seen}

    for name in names:
        if not bench_rows.attempt(name, out, held.device, lambda name=name: work(name)):  # type: ignore[misc]
            sys.exit(1)


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), metavar="CONFIG")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/grid.jsonl"))
    parser.add_argument("--card-gib", type=float, default=78.0, help="what the configs that run side by side may take")
    parser.add_argument("--most", type=int, default=4, help="configs a process")
    parser.add_argument("--seconds", type=float, default=600, help="for one process")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.out)
        return
    if not torch.cuda.is_available():
        sys.exit("error: this measures a GPU, and torch sees none")
    chosen = groups(options.only, options.most)
    needs = [max(need(CONFIGS[name]) for name in group) for group in chosen]
    bench_rows.run_workers(Path(__file__), chosen, options.out, options.seconds, [], needs, options.card_gib)
    for line in bench_rows.read_lines(options.out):
        print(
            line["variant"],
            line.get("error") or f"{line['allocated_gib']:.2f} GiB, {line['reserved_gib']:.2f} reserved",
        )


if __name__ == "__main__":
    main()
