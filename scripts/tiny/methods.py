"""What training methods do on the bundled model: likeness of a subject, and how far it bleeds, over several seeds.

    python scripts/tiny/methods.py runs/methods.jsonl --sets preservation --seeds 0 1 2 3 4
    python scripts/tiny/methods.py runs/methods.jsonl --workers 8       # every set, on a GPU
    python scripts/tiny/methods.py runs/methods.jsonl --table

The subject is a star with a black line around it, in 24 pictures whose captions call it `dotted star`: a trigger that
the model's text encoders tell apart. Of words that they never saw (--trigger zelk) CLIP's vector changes by 4 % alone,
and the model can hardly tell subject and class. A concept and a style are learned likewise (method_sets.py). Each run
is one of train.py's own. Its adapter draws prompts of what was learned, the same without the trigger, and others, and
scripts/tiny/check.py reads the pictures back. A line of the file is a run; what is there is not run again.
"""

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from infer.adapter.attach import load_adapter
from infer.adapter.read import read_pairs
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.device.device import pick_device
from infer.family.family import Text
from infer.family.find import of_model
from infer.family.packing import pack
from infer.program.errors import explained
from infer.quantize.compute import compute_dtype_of
from infer.sample.encode import decode, text_encoder
from scripts import bench_rows
from scripts.tiny.check import inked, right
from scripts.tiny.method_sets import MODEL, PRECISION, Task, job_of, make_pictures, prompts, task_of, variants
from scripts.tiny.method_table import table
from scripts.tiny.world import SIZE
from train.train import train

STEPS = 100
DRAWN, GUIDANCE = 16, 2.0  # steps of the pictures


@dataclass(frozen=True)
class Run:
    """One training, and what it needs to be begun in any process."""

    set: str
    variant: str
    seed: int
    steps: int
    trigger: str
    device: str
    out: Path
    until: float
    """When no run is begun any more, in seconds since 1970."""

    @property
    def changes(self) -> dict[str, Any]:
        return variants()[self.set][self.variant]

    @property
    def task(self) -> Task:
        return task_of(self.changes, self.trigger)

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What is not run again; a variant may have steps, and a task a trigger, of its own."""
        return self.set, self.variant, self.seed, self.changes.get("steps", self.steps), self.task.trigger

    def name_of(self, variant: str) -> str:
        steps = "" if self.steps == STEPS else f"-{self.steps}"
        return f"{self.out.stem}-{self.trigger}-{variant.replace(' ', '_').replace(',', '')}-{self.seed}{steps}"


@cache
def encoded(texts: tuple[str, ...], device: torch.device) -> list[Text]:
    with text_encoder(MODEL, PRECISION, device, None) as encoder:
        return encoder(list(texts))


def draw(transformer: Any, texts: list[Text], device: torch.device) -> torch.Tensor:
    """Packed latents of one picture a text, seeds 0 upwards, all at once."""
    dtype, count = compute_dtype_of(transformer), len(texts)
    start = torch.stack(
        [torch.randn(16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    )
    latents = pack(start).to(device, dtype)
    embeds = torch.stack([text.embeds for text in texts]).to(device, dtype)
    pooled = torch.stack([text.pooled for text in texts if text.pooled is not None]).to(device, dtype)
    family, scheduler = of_model(transformer), load_scheduler(MODEL)
    given = family.inputs(transformer.config, latents, SIZE // 8, SIZE // 8, embeds, pooled, GUIDANCE, dtype)
    mu = family.mu(scheduler.config, latents.shape[1], DRAWN)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / DRAWN, DRAWN), device=device, mu=mu)
    with torch.no_grad():
        for t in scheduler.timesteps:
            time_step = (t.expand(count) / 1000).to(dtype)
            velocity = transformer(**(given | {"hidden_states": latents}), timestep=time_step, return_dict=False)[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


@cache
def base_latents(texts: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """What the model draws without any adapter."""
    return draw(load_transformer(MODEL, PRECISION, device).eval(), encoded(texts, device), device)


def judge(adapter: Path, run: Run, device: torch.device) -> dict[str, float]:
    """Of each kind of prompt: the share that is inked, the share that is right, and how far the adapter moves it."""
    transformer, vae = load_transformer(MODEL, PRECISION, device).eval(), load_vae(MODEL, device)
    load_adapter(transformer, str(adapter), "mine", MODEL)
    found = {}
    for kind, wanted in prompts(run.task).items():
        latents, base = draw(transformer, encoded(tuple(wanted), device), device), base_latents(tuple(wanted), device)
        moved = (latents - base).float().flatten(1).norm(dim=1) / base.float().flatten(1).norm(dim=1)
        plain = [run.task.without(prompt) for prompt in wanted]
        pictures = [decode(vae, one[None], SIZE, SIZE) for one in latents]
        found[f"{kind}_inked"] = fmean(map(inked, pictures, plain))
        found[f"{kind}_right"] = fmean(map(right, pictures, plain))
        found[f"{kind}_moved"] = float(moved.mean())
    return found


def figures(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    seconds = median([line["seconds"] for line in lines if "seconds" in line][5:])
    found = {"seconds_per_step": seconds, "validation_loss": validated[-1]["validation_loss"]}
    return found | {k: v for k, v in validated[-1].items() if k == "validation_preservation"}


def apart(adapter: Path, other: Path) -> float:
    """How far what was learned is from what another run of the same seed learned, as a share of that: of B, as both
    begin with the same A.

    Raises:
        ValueError: the other run is not there.
    """
    if not other.is_dir():
        raise ValueError(f"{other} is not there, from which objectives are told apart; add --sets preservation")
    ours, theirs = (
        {name: pair.up.float() for name, pair in read_pairs(str(each)).items()} for each in (adapter, other)
    )
    distance = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return float((distance / sum(float(up.square().sum()) for up in theirs.values())) ** 0.5)


def train_and_judge(run: Run) -> dict[str, Any] | None:
    """A row; nothing once it is too late to begin."""
    if time.time() > run.until:
        return None
    device, pictures = torch.device(run.device), run.out.parent / f"{run.out.stem}-{run.task.name}"
    job = job_of(run.changes, run.seed, run.steps, pictures, run.task.trigger, device.type, run.name_of(run.variant))
    began = time.monotonic()
    adapter = train(job)
    row: dict[str, Any] = dict(zip(("set", "variant", "seed", "steps", "trigger"), run.key, strict=True))
    row |= figures(adapter.parent)
    row |= judge(adapter, run, device)
    if run.set == "objectives":
        row["apart"] = apart(adapter, adapter.parents[1] / run.name_of("nothing") / adapter.name)
    return row | {"run_seconds": time.monotonic() - began, **bench_rows.circumstances(device)}


def rows_of(runs: list[Run], workers: int) -> Iterator[dict[str, Any]]:
    """The rows as they come. One that fails is told, and the others go on; then SystemExit."""
    failed = 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(train_and_judge, run) for run in runs]):
            if (error := done.exception()) is not None:
                traceback.print_exception(error)
                failed += 1
            elif (row := done.result()) is not None:
                yield row
    if failed:
        sys.exit(f"{failed} of {len(runs)} runs failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a JSON line a run")
    parser.add_argument("--sets", nargs="+", default=list(variants()), choices=list(variants()))
    parser.add_argument("--only", nargs="+", help="these variants alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trigger", default="dotted", help="of the object and the concept; a style's is zelk style")
    parser.add_argument("--workers", type=int, default=1, help="processes that train side by side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="show what is there, and run nothing")
    args = parser.parse_args()
    rows = bench_rows.read_lines(args.out) if args.out.is_file() else []
    if args.table:
        for name in args.sets:
            print(table(rows, name))
        return
    names = [variant for name in args.sets for variant in variants()[name]]
    if unknown := set(args.only or ()) - set(names):
        raise ValueError(
            f"--only: there is no variant {sorted(unknown)} in {', '.join(args.sets)}; choose from {names}"
        )
    until, device = time.time() + args.seconds, str(pick_device(args.device))
    for task in {task_of(changes, args.trigger) for name in args.sets for changes in variants()[name].values()}:
        make_pictures(args.out.parent / f"{args.out.stem}-{task.name}", task)
    done = {(row["set"], row["variant"], row["seed"], row["steps"], row["trigger"]) for row in rows}
    runs = [
        Run(name, variant, seed, args.steps, args.trigger, device, args.out, until)
        for name in args.sets
        for seed in args.seeds
        for variant in variants()[name]
        if args.only is None or variant in args.only
    ]
    for row in rows_of([run for run in runs if run.key not in done], args.workers):
        bench_rows.append(args.out, row)
        print(row, flush=True)


if __name__ == "__main__":
    with explained():
        main()
