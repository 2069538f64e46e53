"""A plan: whether a training config fits a card, which memory settings would, and what a step takes on known cards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.fast.memory import AUTO, Memory, plain_memory
from infer.program import bounds
from infer.program.atomic import replace_file
from infer.program.paths import expand
from train.estimate.memory import Footprint, footprint, references_of
from train.estimate.step_time import CARDS, seconds
from train.run.config import Train
from train.run.names import check_distilled

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
UNKNOWN = "adapters of kind {kind} train on diffusers' own layers, whose time the host decides (docs/methods.md)"
MARGIN = 0.5  # GiB that are left to a desktop and to other programs
KEPT = 0.4  # GiB of what a card is sold with that programs do not see
REFERENCE = CARDS["H100"]  # proposals are ordered by their seconds on this card


@dataclass
class Plan(Train):
    """train.py's options, and the memory that the run must fit."""

    fit_gib: float | None = None
    """Size of a card as it is sold, such as 12: propose the fastest memory settings with which the run fits it."""
    json: bool = False
    """Print the plan as one JSON object too, as the last line."""
    out: str | None = None
    """A file for the JSON object; null writes none."""

    def __post_init__(self) -> None:
        bounds.check_most(self, "", fit_gib=bounds.GIB)
        expand(self, "out")
        Train.__post_init__(self)
        if self.fit_gib is not None and not self.fit_gib > 0:
            raise ValueError(f"fit_gib is {self.fit_gib}; it must be above 0, or null")


def seen_gib(sold: float) -> float:
    """GiB that programs see of a card that is sold with so many: of known cards as they say, the smallest of a size."""
    known = [card.gib for card in CARDS.values() if sold - 1.3 < card.gib <= sold]
    return min(known, default=sold - KEPT)


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe(job: Train) -> str:
    """The settings that decide memory and speed, in one line."""
    memory = "diffusers' own layers" if not job.memory.fused else f"memory.keep={job.memory.keep}"
    if job.memory.keep_all:
        memory += f", memory.keep_all={job.memory.keep_all}"
    if job.memory.unpacked:
        memory += ", memory.unpacked=true"
    if job.memory.budget_gib is not None:
        memory += f", memory.budget_gib={job.memory.budget_gib:g}"
    if job.precision.double_quant:
        memory += ", precision.double_quant=true"
    pixels = "x".join([str(max(job.data.resolutions))] * 2)
    count = references_of(job)
    if count:
        side = job.data.reference_resolution or max(job.data.resolutions)
        pixels += f" with {count} reference{'s' * (count > 1)} of {side}x{side}"
    size = f"rank {job.adapter.rank}" if job.adapter.kind == "lora" else job.adapter.words()
    return f"{job.precision.kind}, {job.data.batch_size} of {pixels} a step, {size}, {memory}"


def proposals(job: Train, gib: float) -> Iterator[tuple[float, Train, Footprint]]:
    """Memory settings with which the config takes at most `gib` GiB, each with its seconds a step on REFERENCE.

    They change time and memory, not what is learned.
    """
    if job.adapter.kind != "lora":
        for memory in (Memory("everything", fused=False), Memory("nothing", fused=False)):
            changed = replace(job, memory=memory)
            if (taken := footprint(changed)).peak <= gib * GIB:
                yield seconds(changed, taken, REFERENCE), changed, taken
        return
    copies = job.precision.quantized and job.precision.products == "bf16"  # others are unpacked for each product
    # products are never kept alone: for the same memory, more blocks that keep everything save more
    unpack = (True,) if job.memory.unpacked else (False, True) if copies else (False,)
    for keep, unpacked in product(("everything", "attention", "nothing"), unpack):
        for budget in (None, gib - 1):
            if budget is not None and (budget <= 0 or keep == "everything" or unpacked):
                continue
            changed = replace(job, memory=Memory(keep, budget_gib=budget, unpacked=unpacked))
            try:
                taken = footprint(changed)
            except ValueError:
                continue  # the budget is too small for these settings
            if taken.peak <= gib * GIB and (budget is None or taken.resident < taken.blocks):
                yield seconds(changed, taken, REFERENCE), changed, taken
                if keep == "attention" and budget is None:
                    yield _with_more_kept(changed, gib)


def _with_more_kept(job: Train, gib: float) -> tuple[float, Train, Footprint]:
    """A config that takes at most `gib` GiB, with everything kept in as many blocks as that allows."""

    def keeping(blocks: int) -> tuple[Train, Footprint]:
        changed = replace(job, memory=replace(job.memory, keep_all=blocks))
        return changed, footprint(changed)

    least, most = 0, footprint(job).blocks
    while least < most:  # more blocks take more memory
        middle = (least + most + 1) // 2
        if keeping(middle)[1].peak <= gib * GIB:
            least = middle
        else:
            most = middle - 1
    changed, taken = keeping(least)
    return seconds(changed, taken, REFERENCE), changed, taken


def on_its_path(job: Train) -> Train:
    """The config with the memory settings of the path that its kind of adapter takes.

    Raises:
        ValueError: a setting needs the fast path, which has no adapters of that kind.
    """
    if job.adapter.kind == "lora":
        return job
    reason = f"it has no adapters of kind {job.adapter.kind}"
    return replace(job, memory=plain_memory(job.memory, reason, job.precision.products))


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
    if job.adapter.kind != "lora":
        return "\n".join([*lines, f"  seconds a step are not known: {UNKNOWN.format(kind=job.adapter.kind)}"])
    lines.append(f"  seconds a step, and the time of {job.steps:,} steps without encoding, validation and previews")
    lines.append("  (measured on an H100; other cards by their datasheets, which is a guess):")
    for name, card in CARDS.items():
        step = seconds(job, taken, card)
        left = card.gib - taken.peak / GIB
        fits = "" if left >= MARGIN else "  does not fit" if left < 0 else f"  {left:.2f} GiB left: without a desktop"
        lines.append(f"    {name:18} {step:6.2f} {duration(step * job.steps):>12}{fits}")
    return "\n".join(lines)


def check_fits(job: Train, gib: float) -> Footprint:
    """The plan of a run on a card with `gib` GiB.

    Raises:
        ValueError: the run does not fit the card; the message names settings with which it would.
    """
    taken = footprint(job)
    if taken.peak <= gib * GIB:
        return taken
    better = propose(job, gib - MARGIN)
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

        gib = torch.cuda.get_device_properties(device).total_memory / GIB
        taken = check_fits(on_its_path(job), gib)
        say(line(taken))
        if (left := gib - taken.peak / GIB) < MARGIN:
            say(f"note: that leaves {left:.2f} GiB of the card: close what else uses it, or take memory=lean")


def write_plan(job: Train, file: Path) -> None:
    """Write what a run on a GPU would take at its peak, to be compared with what it takes."""
    taken = footprint(on_its_path(job))
    said = {"peak_memory_bytes": taken.peak, "parts": {part: getattr(taken, part) for part in PARTS}}
    replace_file(file, lambda path: path.write_text(json.dumps(said)))


def plan(options: Plan) -> dict[str, Any]:
    """Print the plan, and write it where that is asked for; returns the JSON object."""
    if options.precision.kind == "auto":
        raise ValueError(
            "precision=auto is decided by measuring the transformer, and a plan loads none; plan with the "
            "precision that infer/sensitivity.py writes (out=configs/precision/mine.yaml), or with precision=nf4"
        )
    check_distilled(options)
    job: Train = on_its_path(options)
    if job.memory.keep == AUTO and options.fit_gib is None:
        job = replace(job, memory=job.memory.without_auto())
        print("memory=auto is decided by the card: fit_gib=24 says how for one of 24 GB; this is memory=balanced")
    if options.fit_gib is not None:
        room = seen_gib(options.fit_gib) - MARGIN
        found = propose(options, room)
        if found is None:
            raise ValueError(
                f"nothing fits a card of {options.fit_gib:g} GB ({room:.1f} GiB free beside a desktop): lower "
                "data.resolution, data.batch_size or adapter.rank, or "
                "choose precision=nf4"
            )
        job = found[1]
        changes = overrides(options, job)
        print(
            f"the fastest that fits a card of {options.fit_gib:g} GB, {room:.1f} GiB of them free beside a desktop: "
            f"{changes or 'the settings as they are'}"
        )
    taken = footprint(job)
    print(table(job, taken))
    timed = job.adapter.kind == "lora"
    result = {
        "peak_memory_bytes": taken.peak,
        "allocated_bytes": taken.allocated,
        "parts": {part: getattr(taken, part) for part in PARTS},
        "text_phase_bytes": taken.text_phase,
        "host_bytes": taken.host,
        "resident_blocks": taken.resident,
        "blocks": taken.blocks,
        "seconds_per_step": {name: round(seconds(job, taken, card), 4) for name, card in CARDS.items()}
        if timed
        else {},
        "steps": job.steps,
        "memory": asdict(job.memory),
        "double_quant": job.precision.double_quant,
    }
    if options.out is not None:
        file, text = Path(options.out), json.dumps(result, indent=2)
        replace_file(file, lambda path: path.write_text(f"{text}\n"))
        print(f"written: {file}")
    if options.json:
        print(json.dumps(result))
    return result
