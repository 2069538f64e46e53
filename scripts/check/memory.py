"""The GPU's memory: budgets, blocks that all stay, a card that spills, and one that is short."""

from collections.abc import Callable
from typing import Any

import torch

from infer.adapter.lora import Adapter
from infer.fast import offload as offloading
from infer.fast.cuda_graph import Replay
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from scripts.check.bounds import streamed
from scripts.check.case import LORA, NF4, training
from scripts.check.figures import Figures, apart, relative
from scripts.check.runs import learned
from train.loop.spill import FULL, USUAL, Spill
from train.objective.optim import Optim
from train.train import train


def check_budget(name: str, device: torch.device) -> Figures:
    """Training with an optimizer's true states stays within a budget that some of the blocks fit."""
    adapter, optim = Adapter(rank=256, alpha=256.0), Optim(name, lr=1.0 if name == "prodigy" else 1e-3)
    job = training(f"budget-{name}", adapter, device, NF4, Memory(budget_gib=4.0), optim=optim, previews=[])
    whole, budgets = offloading.Offload.fit, []

    def fit(self: Any, _: float, work: Callable[[], object]) -> int:
        self.set_resident(0)
        budgets.append(self._taken(work) + self.host_bytes // 2)
        resident = whole(self, budgets[0] / 2**30, work)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return resident

    setattr(offloading.Offload, "fit", fit)  # noqa: B010 - the types differ in a name
    try:
        train(job)
    finally:
        setattr(offloading.Offload, "fit", whole)  # noqa: B010
    return {"of the budget, held": (torch.cuda.max_memory_reserved(device) / budgets[0], "<=", 1.0)}


def check_stays(device: torch.device) -> Figures:
    """A budget in which all blocks stay on the device: nothing is copied while a step is captured."""
    found = []
    for name, memory in (
        ("fused", Memory()),
        ("all-stay", Memory(budget_gib=8.0)),
        ("three-streamed", Memory(budget_gib=8.0)),
    ):
        blocks = {"all-stay": 0, "three-streamed": 3}.get(name)
        job = training(f"stays-{name}", LORA, device, Precision("bf16"), memory, validation=0.0, previews=[])
        with streamed(blocks):
            train(job)
        found.append(learned(job.run))
    return {
        f"{name}, apart": (apart(other, found[0]), "<=", 0.0)
        for name, other in zip(("all", "three"), found[1:], strict=True)
    }


def check_spill(device: torch.device) -> Figures:
    """A full card whose steps become slow is noticed; slow steps beside free memory, and a full card alone, are not."""
    total = torch.cuda.get_device_properties(device).total_memory
    said = {}
    for name, full, slow in (("full and slow", True, 1.0), ("slow", False, 1.0), ("full", True, 0.1)):
        held = (
            torch.empty(
                int((FULL + 0.01) * total) - torch.cuda.memory_reserved(device), dtype=torch.uint8, device=device
            )
            if full
            else None
        )
        spill = Spill(device)
        told = [spill.note(seconds) for seconds in [0.1] * USUAL + [slow] * 4]
        said[name] = sum(each is not None for each in told)
        del held
        torch.cuda.empty_cache()
    return {f"warnings when {name}": (abs(count - (name == "full and slow")), "<=", 0) for name, count in said.items()}


def check_short(device: torch.device) -> Figures:
    """An ordinary call that finds no memory beside captured ones has theirs."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    replay = Replay(lambda x: (x[:, None] * x[None, :]).sum(1))
    torch.cuda.set_per_process_memory_fraction(1.6 * 2**30 / total)  # each call takes 1 GiB
    try:
        noise = torch.Generator(device).manual_seed(0)
        errors = []
        for size in (16384, 16384, 16384, 16000, 16000):
            x = torch.randn(size, generator=noise, device=device)
            errors.append(relative([replay(x)], [x * x.sum()]))
    finally:
        replay.release()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"error": (max(errors), "<=", 1e-2)}
