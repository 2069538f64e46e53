"""Previews on a second checkpoint (sampling.model) beside the transformer in training, resident and offloaded."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from infer.sample.generate import Sampling
from scripts.check.case import LORA, NF4, STEPS, Case, training
from scripts.check.figures import PICTURE, Figures, nearness
from scripts.check.runs import preview
from train.loop import second
from train.train import train

PATHS = ("plain", "fused", "offloaded")


@contextmanager
def tight() -> Iterator[None]:
    """Within, the second checkpoint is believed not to fit the device as a whole."""
    whole = second.footprint

    def large(job: Any) -> Any:
        return replace(whole(job), weights=2**50)

    setattr(second, "footprint", large)  # noqa: B010 - the types differ in a name
    try:
        yield
    finally:
        setattr(second, "footprint", whole)  # noqa: B010


def check_second(model: str, name: str, device: torch.device) -> Figures:
    """The sheet with its columns on the distilled klein, each path against the plain one. name: as sampling.model."""
    sheets: dict[str, Image.Image] = {}
    for path in PATHS if device.type == "cuda" else PATHS[:2]:
        case = Case("nf4", "plain" if path == "plain" else "fused", "lora", model)
        sampling = Sampling(steps=2, model=name)
        options: dict[str, Any] = {"validation": 0.0, "model": case.checkpoint, "sampling": sampling}
        job = training(f"{model}-second-{path}", LORA, device, NF4, case.memory(device), **options)
        with tight() if path == "offloaded" else nullcontext():
            train(job)
        sheets[path] = preview(job.run, STEPS)
    figures: Figures = {}
    for path, sheet in sheets.items():
        if path != "plain":
            figures[f"{path}: sheet against the plain path's, dB"] = nearness([sheet], [sheets["plain"]]), ">=", PICTURE
    wide = {path: sheet.width for path, sheet in sheets.items()}
    figures["sheets without the second's columns"] = (len({*wide.values()}) - 1, "<=", 0)
    return figures
