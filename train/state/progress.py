"""Where a run is, besides its weights and its optimizer; and putting all of it into a checkpoint and back."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import FluxTransformer2DModel

from infer.adapter.attached import adapter_state, set_adapter_state
from train.objective.ema import Average
from train.run.config import Train
from train.state.checkpoint import (
    best_steps,
    find_checkpoint,
    optimizer_to,
    read_checkpoint,
    retain,
    save_checkpoint,
    set_aside,
)


@dataclass
class Progress:
    """Every figure that a run which resumes needs."""

    samples: str
    """A hash of what is trained on and what is held out."""
    base: str
    """A hash of the transformer's weights."""
    step: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    """Loss by step, as text: of the adapter's own weights."""
    validation_ema: dict[str, float] = field(default_factory=dict)
    """The same of its averaged weights, if there are any."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps: what a spike is measured by."""
    skipped: int = 0
    """Updates left out so far, for a loss or gradient that was not finite."""
    skipped_in_a_row: int = 0

    @property
    def judged(self) -> dict[str, float]:
        """The validation losses by which a checkpoint is among the best."""
        return self.validation_ema or self.validation


@dataclass
class Parts:
    """What is saved and restored together."""

    transformer: FluxTransformer2DModel
    average: Average | None
    optimizer: Any
    schedule: Any
    progress: Progress
    folder: Path
    """The run's."""
    undrawn: str | None = None
    """Why the last previews could not be drawn, if they could not."""


def refuse_other(state: dict[str, Any], samples: str | None, base: str, folder: Path) -> None:
    """Compare a checkpoint with what the run would go on with.

    Raises:
        ValueError: the data or the base model is another.
    """
    mend = f"choose another name with run=..., or delete {folder} to start over"
    if state["base"] != base:
        raise ValueError(
            f"the checkpoints in {folder / 'checkpoints'} were trained on another base model (its transformer's hash "
            f"was {state['base'][:12]}, is {base[:12]}); set model.path to that one, {mend}"
        )
    if samples is not None and state["samples"] != samples:
        raise ValueError(
            "the pictures, captions or the held-out share have changed since the last checkpoint in "
            f"{folder / 'checkpoints'}; {mend}"
        )


def restore(parts: Parts, job: Train, accelerator: Accelerator) -> bool:
    """Go on from the checkpoint that `resume` names, or the newest whole one; False if there is none. All ranks take
    the one that the main rank finds; those beyond it are set aside.

    Raises:
        ValueError: there is none of that name, or it belongs to other data or another base.
    """
    folder = parts.folder / "checkpoints"
    main, now = accelerator.is_main_process, parts.progress
    (found,) = gather_object([find_checkpoint(folder, job.resume, accelerator.print)] if main else [])
    if found is None:
        return False
    adapter, optimizer, state = read_checkpoint(found)
    refuse_other(state, now.samples, now.base, parts.folder)
    schedule, updates, average = state.pop("schedule"), state.pop("ema_updates"), state.pop("average", None)
    if parts.average is not None:
        parts.average.load(average, updates)
    set_adapter_state(parts.transformer, adapter)
    for group, own in zip(optimizer["param_groups"], parts.optimizer.param_groups, strict=True):
        if "fused" in own:  # how it is computed, which is not a checkpoint's affair
            group["fused"] = own["fused"]
    parts.optimizer.load_state_dict(optimizer_to(optimizer, accelerator.device))
    # the rate of this step as the schedule is now: of more steps than before it is another
    rates = [
        base * own(schedule["last_epoch"])
        for base, own in zip(parts.schedule.base_lrs, parts.schedule.lr_lambdas, strict=True)
    ]
    parts.schedule.load_state_dict(schedule | {"_last_lr": rates})
    for group, rate in zip(parts.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    parts.progress = Progress(**state)
    accelerator.wait_for_everyone()  # all have read
    for aside in set_aside(folder, parts.progress.step) if main else []:
        accelerator.print(f"set aside as {aside}: the run goes on from step {parts.progress.step}")
    return True


def save(parts: Parts, learned: dict[str, Any]) -> Path:
    """Write the checkpoint of this step; learned: the optimizer's state dict."""
    average, updates = parts.average.state() if parts.average is not None else (None, 0)
    state = asdict(parts.progress) | {"schedule": parts.schedule.state_dict(), "ema_updates": updates}
    step = state.pop("step")
    return save_checkpoint(
        parts.folder / "checkpoints",
        step,
        adapter_state(parts.transformer),
        learned,
        state,
        average,
    )


def clear(parts: Parts, job: Train) -> None:
    """Remove the checkpoints that are neither among the last `keep` nor among the best `keep_best`."""
    folder = parts.folder / "checkpoints"
    retain(folder, job.keep, best_steps(folder, parts.progress.judged, job.keep_best))
