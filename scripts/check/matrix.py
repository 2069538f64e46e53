"""A case of the matrix: gradients, training, resuming, preview and pictures, against a CPU or the plain path."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts.check.case import STEPS, Case
from scripts.check.figures import GRADIENT, LEARNED, LOSS, PICTURE, Figures, apart, decibels, nearness, relative
from scripts.check.gradients import CPU, gradients, on_a_cpu, truth
from scripts.check.recovery import recovery_of
from scripts.check.runs import learned, losses, pictures, pictures_of, preview, resumed
from train.train import train

EIGHT = {"fp8": 0.07, "int8": 0.03}  # of the gradients: 5.0 and 1.8 % on a CPU
COARSE = 30.0  # decibels of pictures that are drawn by products in 8 bits against those in bf16


def check_case(case: Case, device: torch.device) -> Figures:
    """Every figure of one model, precision, path and kind of adapter."""
    adapter = case.adapter(recovery_of(case))
    figures = gradient_figures(case, device) if adapter.init == "default" else {}
    if case.path == "plain":
        drawn = made(case, device)
        figures["resumed, largest difference"] = resumed(case.job(device, adapter.recovery)), "<=", 0.0
        if device.type == "cuda":
            figures["pictures against a CPU's, dB"] = nearness(drawn, shown(case, CPU)), ">=", PICTURE
        return figures
    made(case.plain, device)
    job = case.job(device, adapter.recovery)
    train(job)
    figures["resumed, largest difference"] = resumed(job), "<=", 0.0
    least = COARSE if case.eight else PICTURE
    if not (adapter.init == "loftq" and case.memory(device).budget_gib is not None):  # refused
        drawn = shown(case, device)
        figures["pictures against the plain path's, dB"] = (
            nearness(drawn, pictures_of(drawing(case.plain))),
            ">=",
            least,
        )
    return figures | training_figures(case, least)


def gradient_figures(case: Case, device: torch.device) -> Figures:
    state, exact = truth(case.model, case.precision, case.kind)
    _, found = gradients(case, case.numbers, case.memory(device), device, state)
    # PEFT rounds DoRA's norms to bf16; of FP4 a CPU rounds the 0.08 % that lie in the middle to the other side
    loose = 2.0 if case.kind == "dora" and case.path == "plain" else 1.0
    if case.precision == "fp4":
        loose = max(loose, 1.7)
    limit = EIGHT.get(case.numbers.products, loose * GRADIENT)
    figures: Figures = {"gradient against fp32 on a CPU": (relative(found, exact), "<=", limit)}
    if case.eight and device.type == "cuda":
        own = on_a_cpu(case.model, case.precision, case.kind)
        figures["gradient against 8 bits on a CPU"] = relative(found, own), "<=", 0.75 * limit
    return figures


def training_figures(case: Case, least: float) -> Figures:
    """What was learned beside the plain path, and beside blocks that all stay on the device."""
    figures: Figures = {}
    adapter, fused = case.adapter(), Case(case.precision, "fused", case.kind, case.model)
    # else it starts from what is computed where the weights are, on a CPU
    same = adapter.init == "default" and not adapter.dora
    if same and case.path == "streamed" and Path("runs", fused.name, "adapter").is_dir():
        figures["learned against the fused path's"] = apart(learned(case.name), learned(fused.name)), "<=", 0.0
    a, b = losses(case.name)[:STEPS], losses(case.plain.name)[:STEPS]
    figures["loss against the plain path's"] = max(abs(x - y) / y for x, y in zip(a, b, strict=True)), "<=", LOSS
    if adapter.init == "default":
        limit = LEARNED * (2 if case.eight else 1)
        figures["learned against the plain path's"] = apart(learned(case.name), learned(case.plain.name)), "<=", limit
    sheets = preview(case.name, STEPS), preview(case.plain.name, STEPS)
    figures["preview against the plain path's, dB"] = decibels(*sheets), ">=", least
    return figures


def made(case: Case, device: torch.device) -> list[Image.Image]:
    """A plain case trained and drawn, unless another row has done so: what the others are compared with."""
    if not Path("runs", drawing(case), "compare", "results.json").is_file():
        train(case.job(device, recovery_of(case)))
        shown(case, device)
    return pictures_of(drawing(case))


def drawing(case: Case) -> str:
    """The name of the run with its pictures."""
    return f"{case.name}-pictures"


def shown(case: Case, device: torch.device) -> list[Image.Image]:
    """Pictures with and without what the plain path trained, drawn by the case's own path."""
    run = f"{case.name}-cpu" if device.type == "cpu" and torch.cuda.is_available() else drawing(case)
    trained: Any = Path("runs", case.plain.name, "adapter")
    how = partial(pictures, run, case.checkpoint, case.numbers, case.memory(device), device, str(trained))
    return how(recovery=recovery_of(case))
