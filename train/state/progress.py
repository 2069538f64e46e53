"""A run's state: weights, optimizer, schedule and progress, into a checkpoint and back."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from infer.adapter.attached import adapter_state, set_adapter_state
from train.objective.ema import Average
from train.state.checkpoint import (
    Checkpoint,
    best_steps,
    optimizer_to,
    retain,
    save_checkpoint,
    set_aside,
)


@dataclass
class Progress:
    """How far a run has come: the figures that a resumed run needs."""

    samples: str
    """A hash of what is trained on and what is held out."""
    base: str
    """A hash of the transformer's weights."""
    step: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    """Loss by step, as text: of the adapter's own weights."""
    validation_ema: dict[str, float] = field(default_factory=dict)
    """The same of its averaged weights, if there are any."""
    levels: int = 0
    """Noise levels at which those were measured; 0: an older checkpoint does not say."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps, with which a loss is compared to find spikes."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """By step, as text: likeness, copying and drift, as far as they were measured."""
    skipped: int = 0
    """Updates left out so far, because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0

    @property
    def judged(self) -> dict[str, float]:
        """The validation losses that decide which checkpoints are the best."""
        return self.validation_ema or self.validation


@dataclass
class TrainingState:
    """What a checkpoint saves and restores."""

    transformer: Any
    average: Average | None
    optimizer: Any
    schedule: Any
    progress: Progress
    folder: Path
    """The run's."""
    ended: str | None = None
    """Why the run ends before its last step; None if it does not. It is not saved."""
    preview_error: str | None = None
    """Why the last previews could not be drawn; None if they were. It is not saved."""


def check_same_run(state: dict[str, Any], samples: str | None, base: str, folder: Path) -> None:
    """Compare a checkpoint's state with the data and the base model that the run would go on with.

    samples, base: hashes, as in `Progress`; None: the samples are not known yet.

    Raises:
        ValueError: one of them is another.
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


def restore(training: TrainingState, checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Continue from a checkpoint on every rank; the checkpoints beyond it are set aside.

    Raises:
        ValueError: the checkpoint belongs to other data or another base model.
    """
    adapter, optimizer, state = checkpoint
    check_same_run(state, training.progress.samples, training.progress.base, training.folder)
    state = dict(state)
    schedule, updates, average = state.pop("schedule"), state.pop("ema_updates"), state.pop("average", None)
    if training.average is not None:
        training.average.load(average, updates)
    set_adapter_state(training.transformer, adapter)
    for group, current in zip(optimizer["param_groups"], training.optimizer.param_groups, strict=True):
        if "fused" in current:  # this run chooses how it is computed, not the checkpoint
            group["fused"] = current["fused"]
    training.optimizer.load_state_dict(optimizer_to(optimizer, accelerator.device))
    # the rate of this step in a run of as many steps as are asked for now
    rates = [
        base * rate(schedule["last_epoch"])
        for base, rate in zip(training.schedule.base_lrs, training.schedule.lr_lambdas, strict=True)
    ]
    training.schedule.load_state_dict(schedule | {"_last_lr": rates})
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    levels, training.progress = training.progress.levels, Progress(**state)
    if training.progress.levels not in (0, levels):
        training.progress.validation, training.progress.validation_ema = {}, {}
        accelerator.print(
            f"note: validation_levels was {training.progress.levels} and is {levels}: validation figures begin anew"
        )
    training.progress.levels = levels
    accelerator.wait_for_everyone()  # all have read
    step = training.progress.step
    for moved in set_aside(training.folder / "checkpoints", step) if accelerator.is_main_process else []:
        accelerator.print(f"set aside as {moved}: the run goes on from step {step}")


def save(training: TrainingState, optimizer: dict[str, Any]) -> Path:
    """Write the checkpoint of this step; optimizer: its state dict, whole."""
    average, updates = training.average.state() if training.average is not None else (None, 0)
    state = asdict(training.progress) | {"schedule": training.schedule.state_dict(), "ema_updates": updates}
    step = state.pop("step")
    return save_checkpoint(
        training.folder / "checkpoints",
        step,
        adapter_state(training.transformer),
        optimizer,
        state,
        average,
    )


def remove_old_checkpoints(training: TrainingState, keep: int, keep_best: int) -> None:
    """Remove the checkpoints that are neither among the newest `keep` nor among the best `keep_best`."""
    folder = training.folder / "checkpoints"
    retain(folder, keep, best_steps(folder, training.progress.judged, keep_best))
