"""The settings of sensitivity and recovery, and what can be checked of them before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from infer.adapter.checks import check_guidance, check_precision, undecided
from infer.checkpoint.files import read_config
from infer.checkpoint.headers import check_model
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.device.device import check_device_name, pick_device
from infer.program.bounds import GIB, MANY, SEED, STEPS, check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand
from infer.program.run_names import check_run_name
from infer.quantize.eight_bit_products import refuse_products
from infer.quantize.precision import Precision
from infer.rounding.budget import HEADER
from infer.sample.generate import Sampling

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "a large red star in the middle on a sky background",
    "two blue circles on a cream background",
    "a photo of a cat on a wooden table",
    "a portrait of an old man, oil painting",
)


@dataclass
class Sensitivity:
    """What to measure, and what to make of it."""

    model: Model = field(default_factory=Model)
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    """What is drawn to come by latents; the prompt's place in the list is its seed."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=4))
    """Latents of every step are measured at; null sizes take the checkpoint's own, at most 512."""
    double_quant: bool = False
    """Quantize the absmax of 4-bit layers too."""
    budget_gib: float | None = None
    """Bytes of the transformer that the mixture may take; null proposes none."""
    out: str | None = None
    """A YAML file for the mixture, as one of configs/precision; null writes none."""
    run: str = "sensitivity"
    """Its folder is runs/<run>."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        refuse_idle(self.sampling, "sampling.", ("model",), "this command draws on one model")
        check_most(self, "", budget_gib=GIB)
        expand(self, "out")
        if not self.prompts:
            raise ValueError("prompts is empty; give at least one, as in 'prompts=[a red star]'")
        if self.out is not None and self.budget_gib is None:
            raise ValueError(f"out is {self.out!r}, but budget_gib is null; say how many bytes the mixture may take")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"budget_gib is {self.budget_gib}; it must be above 0, or null")


@dataclass
class Recover:
    """One recovery adapter."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    sampling: Sampling = field(default_factory=Sampling)
    """Of the pictures that calibrate it: every step of each is a record."""
    prompts: list[str] = field(default_factory=list)
    """What calibrates it: some dozen that are like what will be drawn."""
    held_out: list[str] = field(default_factory=list)
    """Prompts by which it is measured, none of which calibrates it."""
    share: float = 0.05
    """Its bytes in bf16, as a share of the quantized transformer's."""
    rows: int = 4096
    """Rows of inputs and of gradients kept of each layer, on the host."""
    most: int = 128
    """The highest rank of a layer."""
    polish: int = 0
    """Steps of training towards the bf16 velocity afterwards, one record each."""
    rate: float = 1e-4
    """Their learning rate (Adam, falling to zero as a cosine)."""
    seed: int = 0
    """Of the pictures that calibrate it."""
    run: str = "recover"
    """Its folder is runs/<run>; the recovery adapter is runs/<run>/adapter."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        refuse_idle(self.sampling, "sampling.", ("model",), "this command draws on one model")
        check_most(self, "", share=1000, rows=10**7, most=2**14, polish=STEPS, rate=MANY, seed=SEED // 2)
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")
        for name, least in (("rows", 1), ("most", 1), ("polish", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; it must be above 0")
        if not self.polish:
            refuse_idle(self, "", ("rate",), "it is that of polish, which is 0 steps")
        if not self.prompts or not self.held_out or set(self.prompts) & set(self.held_out):
            raise ValueError("recover needs prompts, and others as held_out, as in 'prompts=[a red star]'")


def check_sensitivity(options: Sensitivity) -> torch.device:
    """See that the measurement can be begun; returns the device.

    Raises:
        ValueError: a name is wrong, the checkpoint is absent, or `out` is a file of somebody else's.
    """
    check_run_name(options.run)
    check_device_name(options.device)
    check_model(options.model)
    file = None if options.out is None else Path(options.out)
    if file is not None and file.exists() and not (file.is_file() and HEADER in file.read_text(errors="replace")):
        raise ValueError(f"out is {options.out!r}, which is there and not of this command; give another file")
    check_guidance(options.model, options.sampling.guidance)
    return pick_device(options.device)


def check_recover(options: Recover) -> torch.device:
    """See that a recovery adapter can be begun; returns the device.

    Raises:
        ValueError: no layer is quantized, the adapter exists, the checkpoint is absent or does not fit the precision.
    """
    if not options.precision.quantized:
        raise ValueError(f"precision is {options.precision.kind}, which loses nothing; choose nf4, fp4 or int8")
    refuse_products(options.precision, "a recovery adapter, which makes up for what is stored")
    check_device_name(options.device)
    folder = check_run_name(options.run)
    if (folder / "adapter").exists():
        raise ValueError(f"{folder / 'adapter'} exists; choose another name with run=..., or delete it")
    check_model(options.model)
    layers = linear_shapes(read_config(options.model, "transformer"))
    check_guidance(options.model, options.sampling.guidance)
    check_precision(options.model, undecided(options.precision) or options.precision, layers)
    return pick_device(options.device)
