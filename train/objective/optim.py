"""The optimizer of an adapter and its learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

from infer.program.bounds import MANY, STEPS, check_most

NAMES = ("adamw", "adamw8bit", "paged_adamw8bit", "prodigy")
SCHEDULES = ("constant", "linear", "cosine")
# bytes of each tensor of states per parameter: two of Adam's; Prodigy has two more
STATES = {"adamw": (4, 4), "adamw8bit": (1, 1), "paged_adamw8bit": (1, 1), "prodigy": (4, 4, 4, 4)}
# tensors of a parameter's size that an update makes and drops, one parameter after another
SCRATCH = {"prodigy": 2}
SMALL = 4096  # the 8-bit optimizers keep tensors with fewer parameters in fp32


@dataclass
class Optim:
    """How the adapter learns."""

    name: str = "adamw"
    """adamw (fused), adamw8bit and paged_adamw8bit (bitsandbytes), or prodigy (finds its own rate; lr=1)."""
    lr: float = 1e-4
    """Learning rate: 1e-4 to 4e-4 is usual for adapters (1 for prodigy)."""
    beta1: float = 0.9
    """Decay of Adam's mean of the gradient."""
    beta2: float = 0.999
    """Decay of Adam's mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.01
    """Of AdamW, times the learning rate."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    schedule: str = "constant"
    """constant, linear or cosine (both fall to 0 at the last step)."""
    warmup: int = 0
    """Steps during which the rate rises from 0."""

    def __post_init__(self) -> None:
        check_most(self, "optim.", lr=MANY, eps=1, weight_decay=10**6, clip=MANY, warmup=STEPS)
        if self.name not in NAMES:
            raise ValueError(f"optim.name is {self.name!r}; choose one of {', '.join(NAMES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if not self.lr > 0:
            raise ValueError(f"optim.lr is {self.lr}; it must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not self.eps > 0:
            raise ValueError(f"optim.eps is {self.eps}; it must be above 0, such as 1e-8")
        for name in ("warmup", "clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be 0 or more")


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over the adapter's parameters.

    Raises:
        ValueError: Prodigy is asked for and not installed.
    """
    import torch

    parameters = list(parameters)
    common: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    if optim.name == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise ValueError("optim.name=prodigy needs a package of its own: pip install prodigyopt") from error
        return Prodigy(parameters, safeguard_warmup=optim.warmup > 0, use_bias_correction=True, **common)  # type: ignore[no-any-return]
    import bitsandbytes as bnb

    kinds = {"adamw8bit": bnb.optim.AdamW8bit, "paged_adamw8bit": bnb.optim.PagedAdamW8bit}
    return kinds[optim.name](parameters, **common)  # type: ignore[no-any-return]


def state_sizes(name: str, size: int) -> list[int]:
    """Bytes of each tensor of an optimizer's states for a tensor of so many parameters, at most. Prodigy needs less for
    one that begins as zeros, since it does not keep its start."""
    each = STATES["adamw"] if "8bit" in name and size < SMALL else STATES[name]
    return [width * size for width in each]


def state_bytes(name: str, sizes: Iterable[int]) -> int:
    """Bytes of an optimizer's states, at most. sizes: the number of parameters of each tensor."""
    return sum(sum(state_sizes(name, size)) for size in sizes)


def step_if(optimizer: torch.optim.AdamW, finite: Tensor, norm: Tensor, clip: float) -> None:
    """Update with clipped gradients if `finite` is true, else change nothing. The device decides, so that the host need
    not wait for it. The gradients themselves stay as they are.

    finite: [], bool. norm: the gradients' norm, []. clip: their largest norm; 0 does not clip.

    It uses what fused optimizers offer to torch.amp.GradScaler: they divide each gradient by a scale as they read it,
    which is here the scale of torch.nn.utils.clip_grads_with_norm_.
    """
    assert all(group["fused"] for group in optimizer.param_groups), "only the fused optimizer reads a scale"
    fused: Any = optimizer
    largest = clip if clip > 0 else math.inf
    fused.grad_scale = 1 / (largest / (norm + 1e-6)).clamp(max=1.0)
    fused.found_inf = 1.0 - finite.float()
    try:
        fused.step()
    finally:
        del fused.grad_scale, fused.found_inf


def make_schedule(optim: Optim, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's schedule; call its `step` after each update."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=optim.warmup, num_training_steps=steps
    )
    return schedule


def rate_at(optim: Optim, steps: int, step: int) -> float:
    """The learning rate at one step of a run of `steps` steps."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule: Any = make_schedule(optim, torch.optim.SGD([parameter], lr=optim.lr), steps)
    return optim.lr * float(schedule.lr_lambdas[0](step))
