"""memory=auto: the fastest memory settings that the plan says fit the card that a run is on.

One trade: every block keeps its attention, and as many blocks as there is room for keep everything, about 4 ms a GiB at
1024x1024 on an H100; beyond that weights are kept unpacked, 1 ms a GiB. Where that brings next to nothing, as with the
bundled model, and on a CPU, it is memory=balanced. What was decided stays for the run: numbers differ by rounding
between the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from infer.fast.memory import AUTO, Memory
from infer.program.atomic import replace_file
from train.estimate.memory import CONTEXT, Footprint, footprint
from train.estimate.plan import GIB, MARGIN, REFERENCE, proposals
from train.estimate.step_time import seconds
from train.run.config import Train

FILE = "memory.yaml"
SHARE = 0.06  # of the card is left, as the plan may be wrong by half of that
DECODING = 3.0  # GiB that are left to a preview's autoencoder, for each 1024 x 1024 pixels
NEAR = 0.01  # share of a step that is not worth more memory, nor blocks in host memory
LEAST = 0.01, 0.002  # share of a step, and seconds, that keeping more has to save


def rooms(gib: float, free: float, pixels: int) -> list[float]:
    """GiB of a card of `gib`, of which `free` are not taken by others, that training may take: beside the decoding of
    previews of so many pixels (0: none are drawn), and, if nothing fits there, without."""
    most = min(gib, free + CONTEXT / GIB) - max(MARGIN, SHARE * gib)
    return [most - DECODING * pixels / 1024**2, most]


def decide(job: Train, rooms: list[float]) -> tuple[Memory, str]:
    """The settings in place of memory.keep=auto where training may take so many GiB, the first where something fits,
    and what they are in words.

    Raises:
        ValueError: the adapter's targets match no layer.
    """
    balanced = job.memory.without_auto()
    if not job.memory.fused or job.memory.budget_gib is not None:
        return balanced, f"memory.keep={balanced.keep}"
    usual = replace(job, memory=balanced)
    taken = footprint(usual)
    before = seconds(usual, taken, REFERENCE)
    found, gib = [], 0.0
    for gib in rooms:
        found = list(proposals(job, gib))
        if found:
            break
    else:
        return balanced, "memory.keep=attention, though the plan has no room for it"
    quickest = min(each[0] for each in found)
    near = [each for each in found if each[0] <= (1 + NEAR) * quickest]
    after, wanted, _ = min(near, key=lambda each: (each[1].memory.budget_gib is not None, each[2].peak))
    fits = taken.peak <= gib * GIB
    if fits and before - after < max(LEAST[0] * before, LEAST[1]):
        return balanced, "memory.keep=attention; keeping more does not fit, or saves next to nothing"
    new = wanted.memory
    chosen = replace(balanced, keep=new.keep, keep_all=new.keep_all, unpacked=new.unpacked, budget_gib=new.budget_gib)
    return chosen, f"{_words(new, taken)}, the fastest that the plan fits into {gib:.1f} GiB"


def _words(memory: Memory, taken: Footprint) -> str:
    said = f"memory.keep={memory.keep}"
    if memory.keep_all:
        said += f" memory.keep_all={memory.keep_all} (of {taken.blocks} blocks)"
    if memory.unpacked:
        said += " memory.unpacked=true"
    if memory.budget_gib is not None:
        said += f" memory.budget_gib={memory.budget_gib:.1f}"
    return said


def _read(file: Path) -> Memory:
    try:
        return Memory(**yaml.safe_load(file.read_bytes()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{file} is not what this run wrote ({said}); delete it, or set memory.keep") from error


def settle(job: Train, folder: Path, resumed: bool, rooms: list[float] | None, say: Callable[[str], object]) -> Memory:
    """The run's memory settings, with those of its start in place of auto if it goes on; keeps them in its folder.

    rooms: GiB that training may take of the GPU; None on a CPU.

    Raises:
        ValueError: the adapter's targets match no layer, or the file is damaged.
    """
    if job.memory.keep != AUTO:
        return job.memory
    file = folder / FILE
    if resumed:
        # a run of an older version had memory=balanced
        began = _read(file) if file.is_file() else Memory()
        if rooms is None:  # what a start here would take; the file stays for the card
            return job.memory.without_auto()
        given = job.memory.budget_gib is not None or (job.memory.unpacked and not began.unpacked)
        began = replace(began, compile=job.memory.compile, graph=job.memory.graph)
        if not given and footprint(replace(job, memory=began)).peak <= (rooms[-1] + MARGIN) * GIB:
            return began
    memory, said = (job.memory.without_auto(), "") if rooms is None else decide(job, rooms)
    if said:
        say(f"memory=auto: {said}")
    text = yaml.safe_dump(asdict(memory))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(text))
    return memory
