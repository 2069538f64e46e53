"""A plan: whether a training config fits a card, which memory settings would, and what a step takes on known cards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from infer.fast.memory import Memory
from infer.program import bounds
from train.estimate.memory import Footprint, footprint
from train.estimate.step_time import CARDS, seconds
from train.run.config import Train

if TYPE_CHECKING:
    import torch

GIB = 2**30
PARTS = ("weights", "adapters", "gradients", "optimizer", "checkpoints", "block", "workspace", "allocator", "context")
MEANING = {
    "weights": "the transformer's, as stored",
    "adapters": "in fp32, and their average if the run keeps one",
    "gradients": "of the adapters",
    "optimizer": "its states",
    "checkpoints": "tensors of each block, kept for its backward pass",
    "block": "working memory of one block's backward pass",
    "workspace": "of cuBLAS and cuDNN",
    "allocator": "held by torch's allocator beyond the allocated bytes",
    "context": "CUDA's own",
}
REFERENCE = CARDS["H100"]  # proposals are ordered by their seconds on this card


@dataclass
class Plan(Train):
    """train.py's options, and the memory that the run must fit."""

    fit_gib: float | None = None
    """GiB of a card: propose the fastest memory settings with which the run fits it."""

    def __post_init__(self) -> None:
        bounds.check_most(self, "", fit_gib=bounds.GIB)
        Train.__post_init__(self)
        if self.fit_gib is not None and not self.fit_gib > 0:
            raise ValueError(f"fit_gib is {self.fit_gib}; it must be above 0, or null")


def describe(job: Train) -> str:
    """The settings that decide memory and speed, in one line."""
    memory = "diffusers' own layers" if not job.memory.fused else f"memory.keep={job.memory.keep}"
    if job.memory.budget_gib is not None:
        memory += f", memory.budget_gib={job.memory.budget_gib:g}"
    if job.precision.double_quant:
        memory += ", precision.double_quant=true"
    pixels = "x".join([str(max(job.data.resolutions))] * 2)
    return f"{job.precision.kind}, {job.data.batch_size} of {pixels} a step, rank {job.adapter.rank}, {memory}"


def proposals(job: Train, gib: float) -> Iterator[tuple[float, Train, Footprint]]:
    """Memory settings with which the config fits, each with its seconds a step on the reference card.

    They change time and memory, not what is learned.
    """
    for keep in ("everything", "products", "attention", "nothing"):
        for budget in (None, gib - 1):
            if budget is not None and (budget <= 0 or keep not in ("attention", "nothing")):
                continue
            changed = replace(job, memory=Memory(keep, budget_gib=budget))
            try:
                taken = footprint(changed)
            except ValueError:
                continue  # the budget is too small for these settings
            if taken.peak <= gib * GIB and (budget is None or taken.resident < taken.blocks):
                yield seconds(changed, taken, REFERENCE), changed, taken


def propose(job: Train, gib: float) -> tuple[float, Train, Footprint] | None:
    """The fastest of the proposals, or None where nothing fits.

    Where nothing else fits a 4-bit precision, double quantization is tried too, which changes the weights slightly.
    """
    found = list(proposals(job, gib))
    if not found and job.precision.kind in ("nf4", "fp4") and not job.precision.double_quant:
        found = list(proposals(replace(job, precision=replace(job.precision, double_quant=True)), gib))
    return min(found, key=lambda each: each[0]) if found else None


def overrides(job: Train, wanted: Train) -> str:
    """The options that turn the command of `job` into that of `wanted`."""
    words = []
    for name in ("memory", "precision"):
        now, then = getattr(job, name), getattr(wanted, name)
        for each in fields(then):
            value = getattr(then, each.name)
            if value != getattr(now, each.name):
                words.append(f"{name}.{each.name}={'null' if value is None else str(value).lower()}")
    return " ".join(words)


def line(taken: Footprint) -> str:
    """The plan in one line."""
    parts = ", ".join(f"{part} {getattr(taken, part) / GIB:.2f}" for part in PARTS)
    return f"plan: {taken.peak / GIB:.2f} GiB at the peak ({parts})"


def table(job: Train, taken: Footprint) -> str:
    """The plan as a table for the terminal: memory by part, seconds by card."""
    lines = [describe(job)]
    lines += [f"  {part:12} {getattr(taken, part) / GIB:7.2f} GiB  {MEANING[part]}" for part in PARTS]
    if taken.text_phase > taken.allocated:
        lines.append(
            f"  {'text phase':12} {taken.text_phase / GIB:7.2f} GiB  the text encoders, before training; above the rest"
        )
    lines.append(f"  {'peak':12} {taken.peak / GIB:7.2f} GiB")
    if taken.resident < taken.blocks:
        stay = f"{taken.resident} of {taken.blocks} blocks stay on the device"
        lines.append(f"  {stay}; {taken.host / GIB:.2f} GiB of pinned host memory")
    lines.append("  about seconds a step (measured shares of an H100's rates; other cards by their datasheets):")
    for name, card in CARDS.items():
        fits = "" if taken.peak <= card.gib * GIB else "  does not fit"
        lines.append(f"    {name:18} {seconds(job, taken, card):6.2f}{fits}")
    return "\n".join(lines)


def check_fits(job: Train, gib: float) -> Footprint:
    """The plan of a run on a card with `gib` GiB.

    Raises:
        ValueError: the run does not fit the card; the message names settings with which it would.
    """
    taken = footprint(job)
    if taken.peak <= gib * GIB:
        return taken
    better = propose(job, gib)
    if better is None:
        advice = "no memory setting makes it fit; lower data.resolution, data.batch_size or adapter.rank"
    else:
        advice = f"add {overrides(job, better[1])} (about {better[2].peak / GIB:.1f} GiB)"
    raise ValueError(f"the run needs about {taken.peak / GIB:.1f} GiB and the card has {gib:.1f}: {advice}")


def announce(job: Train, device: torch.device, say: Callable[[str], object]) -> None:
    """Say how much memory a run on a GPU will take, before anything is loaded.

    Raises:
        ValueError: the run does not fit the GPU.
    """
    if device.type == "cuda":
        import torch

        say(line(check_fits(job, torch.cuda.get_device_properties(device).total_memory / GIB)))


def plan(options: Plan) -> dict[str, Any]:
    """Print the plan; returns the JSON object."""
    if options.precision.kind == "auto":
        raise ValueError(
            "precision=auto is decided by measuring the transformer, and a plan loads none; plan with the "
            "precision that infer/sensitivity.py writes (out=configs/precision/mine.yaml), or with precision=nf4"
        )
    job: Train = options
    if options.fit_gib is not None:
        found = propose(options, options.fit_gib)
        if found is None:
            raise ValueError(
                f"nothing fits {options.fit_gib:g} GiB: lower data.resolution, data.batch_size or adapter.rank, or "
                "choose precision=nf4"
            )
        job = found[1]
        changes = overrides(options, job)
        print(f"the fastest that fits {options.fit_gib:g} GiB: {changes or 'the settings as they are'}")
    taken = footprint(job)
    print(table(job, taken))
    result = {
        "peak_memory_bytes": taken.peak,
        "allocated_bytes": taken.allocated,
        "parts": {part: getattr(taken, part) for part in PARTS},
        "text_phase_bytes": taken.text_phase,
        "host_bytes": taken.host,
        "resident_blocks": taken.resident,
        "blocks": taken.blocks,
        "seconds_per_step": {name: round(seconds(job, taken, card), 4) for name, card in CARDS.items()},
        "memory": asdict(job.memory),
        "double_quant": job.precision.double_quant,
    }
    print(json.dumps(result))
    return result
