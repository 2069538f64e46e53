"""The settings of a merge, and what can be checked of them before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from infer.adapter.checks import check_guidance, check_precision
from infer.adapter.selection import Trained
from infer.checkpoint.file_checks import check_written
from infer.checkpoint.files import read_config
from infer.checkpoint.headers import check_model
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.checkpoint.save import refuse_mixture
from infer.device.device import check_device_name, pick_device
from infer.program.bounds import SEED, check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand
from infer.quantize.eight_bit_products import refuse_products
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling

if TYPE_CHECKING:
    import torch


@dataclass
class Merge:
    """What is merged into what, and where it goes."""

    model: Model = field(default_factory=Model)
    """The unquantized checkpoint."""
    precision: Precision = field(default_factory=Precision)
    """Of the result."""
    adapter: Trained = field(default_factory=Trained)
    out: str = ""
    """A folder that does not exist yet."""
    prompts: list[str] = field(default_factory=list)
    """Drawn with the adapters in bf16, with them at run time at `precision`, and merged."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    """Of the drawing of `prompts`."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        refuse_idle(self.sampling, "sampling.", ("model",), "this command draws on one model")
        check_most(self, "", seed=SEED)
        expand(self, "out")


def check_merge(options: Merge) -> torch.device:
    """See that a merge can be begun; returns the device.

    Raises:
        ValueError: `out` is empty or exists, the adapter or the checkpoint is absent, or a setting has no effect.
    """
    refuse_products(options.precision, "what is merged")
    refuse_mixture(options.precision, "merge with precision=bf16, and load the result with the same precision")
    if not options.prompts:
        reason = "nothing is drawn, since prompts is empty"
        refuse_idle(options, "", ("seed",), reason)
        refuse_idle(options.sampling, "sampling.", ("steps", "guidance", "height", "width"), reason)
    check_device_name(options.device)
    check_model(options.model)
    check_written(options.model)
    if not options.adapter.all():
        raise ValueError("adapter.path is null; give the LoRA file to merge, more of them as adapter.also=[{path:b}]")
    if not options.out or Path(options.out).exists():
        raise ValueError(f"out is {options.out!r}; give a folder that does not exist yet")
    device = pick_device(options.device)
    check_guidance(options.model, options.sampling.guidance)
    check_precision(options.model, options.precision, linear_shapes(read_config(options.model, "transformer")))
    return device
