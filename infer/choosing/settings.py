"""The settings of a choice among a run's checkpoints, and what can be checked of them before torch is imported."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from infer.checkpoint.headers import check_model
from infer.choosing.run import RunFiles, read_run
from infer.device.device import check_device_name, pick_device
from infer.fast.memory import Memory
from infer.program.bounds import SEED, check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand
from infer.program.run_names import check_run_name
from infer.sample.generate import Sampling
from infer.score.judges import UNRELATED, Networks, check_paths, list_pictures

if TYPE_CHECKING:
    import torch


@dataclass
class Choose:
    """A run's best checkpoint: a grid of checkpoint, prompt and strength, scores, and the one to take."""

    run: str = "train"
    """The run, whose model and precision are drawn with."""
    checkpoints: list[str] = field(default_factory=list)
    """Names such as step-000200; none takes all that the run has kept (keep=, keep_best=)."""
    prompts: list[str] = field(default_factory=list)
    """What is drawn, or `prompts=@FILE` with one a line; none takes those of the run's last previews."""
    weights: list[float] = field(default_factory=lambda: [1.0])
    """Strengths at which each checkpoint is drawn."""
    unrelated: list[str] = field(default_factory=lambda: list(UNRELATED))
    """Prompts that the adapter has nothing to do with: how far it moves them is its drift."""
    average: bool | None = None
    """Draw and take the moving averages of the checkpoints' weights (train.py's ema) rather than the weights; null
    takes them where every checkpoint has one."""
    seed: int = 0
    """Of the noise: all pictures have the same."""
    references: str | None = None
    """The folder of the training pictures, for likeness and copying; null takes the run's data.path."""
    networks: Networks = field(default_factory=Networks)
    sampling: Sampling = field(default_factory=Sampling)
    memory: Memory = field(default_factory=Memory)
    resident: bool = False
    """Have a process draw that stays with the model loaded (infer/serve.py); it is started if there is none."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""
    take: str | None = None
    """A checkpoint's name, or best: nothing is drawn, it is written to runs/<run>/chosen as an adapter. null draws."""

    def __post_init__(self) -> None:
        check_most(self, "", seed=SEED, weights=10**6)
        expand(self, "references")
        for what in ("checkpoints", "prompts", "weights", "unrelated"):
            twice = [one for one, times in Counter(getattr(self, what)).items() if times > 1]
            if twice:
                raise ValueError(f"{what} has {twice[0]!r} twice; give each once")
        for name in [*self.checkpoints, *([self.take] if self.take not in (None, "best") else [])]:
            if not re.fullmatch(r"step-\d+", str(name)):
                raise ValueError(f"{name!r} is no checkpoint's name; give one such as step-000200")
        refuse_idle(self.sampling, "sampling.", ("model",), "checkpoints are drawn on the run's own model")
        if self.take is not None:
            reason = f"take={self.take} draws nothing"
            refuse_idle(self, "", ("prompts", "weights", "unrelated", "seed", "references", "resident"), reason)
            refuse_idle(self.networks, "networks.", ("clip", "dino", "lpips", "image_reward"), reason)
            refuse_idle(self.sampling, "sampling.", ("steps", "guidance", "height", "width"), reason)
        if not self.weights:
            raise ValueError("weights is []; give at least one, as in weights=[1]")
        if bad := [weight for weight in self.weights if not math.isfinite(weight) or not weight]:
            raise ValueError(f"weights has {bad[0]}; give numbers but 0: the base is drawn beside in any case")


def check_choose(options: Choose) -> tuple[RunFiles, torch.device]:
    """See that everything that a choice names is there; returns the run's files and the device.

    Raises:
        ValueError: something is not.
    """
    return check_named(options), pick_device(options.device)


def check_named(options: Choose) -> RunFiles:
    """The same without the device, for which torch is imported."""
    check_device_name(options.device)
    files = read_run(check_run_name(options.run), options.checkpoints, options.average)
    if options.take is not None:
        if options.take != "best" and options.take not in files.checkpoints:
            raise ValueError(f"take is {options.take!r}; the run has {', '.join(files.checkpoints)}")
        return files
    if not (options.prompts or files.prompts):
        raise ValueError('the run has no previews to take prompts from; give prompts=["a cup on a table"]')
    check_model(files.model)
    check_paths(options.networks)
    if references := options.references or files.data:
        list_pictures(references)
    return files


def references_of(options: Choose, files: RunFiles) -> str | None:
    """The folder of the training pictures; None if the run's data is no folder that is here."""
    if options.references is not None:
        return options.references
    return files.data if files.data and Path(files.data).is_dir() else None
