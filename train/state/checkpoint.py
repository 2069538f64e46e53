"""A run's state on disk: `checkpoints/step-000200/` holds the adapter, its average, the optimizer and the progress.

Safetensors and JSON only, and never the base model. A checkpoint is written under a temporary name and renamed, so
that it is whole or absent; checksums tell one that was torn or altered afterwards, and the one before it is used
instead. It is the state right after its step's update: validation and previews that are due at this step come later.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infer.program.atomic import sync_folder
from train.state.steps import ADAPTER, AVERAGE, OPTIMIZER, STATE, list_checkpoints, read_whole, step_of


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    adapter: dict[str, Tensor]
    """Its tensors under PEFT's names."""
    optimizer: dict[str, Any]
    """Its state dict."""
    state: dict[str, Any]
    """The progress, the schedule, and, where there are any, the averaged weights as `average`."""


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Replace each tensor in nested containers by its name, and collect the tensors; the rest becomes JSON."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # copied: bitsandbytes' states share tensors, which safetensors refuses
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, tensors) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):  # Prodigy's growth_rate is inf, which JSON has not
        return {"float": str(value)}
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "float" in value:
        return float(value["float"])
    if "list" in value:
        return [_restore(item, tensors) for item in value["list"]]
    return {key: _restore(item, tensors) for key, item in value["items"]}


def save_checkpoint(
    folder: Path,
    step: int,
    adapter: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    average: dict[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-<step>`; average: the adapter's averaged weights, where there are any."""
    tensors: dict[str, Tensor] = {}
    layout = _flatten(optimizer, tensors)
    files = {ADAPTER: save(adapter), OPTIMIZER: save(tensors)}
    if average is not None:
        files[AVERAGE] = save(average)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    body = {"step": step, "optimizer": layout, **state}
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    header = {"sha256": sums | {STATE: hashlib.sha256(text.encode()).hexdigest()}, "state": text}
    files[STATE] = json.dumps(header).encode()

    target = folder / f"step-{step:06d}"
    partial = folder / f"{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that died; in a container the next has its id
    partial.mkdir(parents=True)
    try:
        for name, content in files.items():
            with (partial / name).open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one: the run came here again
        partial.rename(target)
        sync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def retain(folder: Path, keep: int, best: list[int]) -> None:
    """Remove all checkpoints but the newest `keep` and those of the steps in `best`, and the partial ones of killed
    processes."""
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)
    for old in list_checkpoints(folder)[:-keep]:
        if step_of(old) not in best:  # renamed first, so that nobody takes one that is half removed for a checkpoint
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial")))


def best_steps(folder: Path, losses: dict[str, float], count: int) -> list[int]:
    """Of the steps that have a checkpoint, the `count` with the lowest validation loss; of equal ones the earlier."""
    there = [step_of(path) for path in list_checkpoints(folder) if str(step_of(path)) in losses]
    return sorted(there, key=lambda step: (losses[str(step)], step))[:count]


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond the step from which the run goes on: none of them is its newest any more."""
    moved = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's folder and compare its checksums.

    Raises:
        ValueError: a file is absent, unreadable, or differs from what was written.
    """
    try:
        text, contents = read_whole(path)
        state = json.loads(text)
        optimizer = _restore(state.pop("optimizer"), load(contents[OPTIMIZER]))
        adapter = load(contents[ADAPTER])
        if AVERAGE in contents:
            state["average"] = load(contents[AVERAGE])
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error})") from error
    return Checkpoint(adapter, optimizer, state)


def find_checkpoint(folder: Path, name: str | None, warn: Callable[[str], object]) -> tuple[Path, Checkpoint] | None:
    """Read the named checkpoint, or else the newest that is whole; `warn` is told of each damaged one.

    Returns: its folder and what it holds; None if there is none.

    Raises:
        ValueError: the named one is absent or damaged.
    """
    if name is not None:
        return folder / name, read_checkpoint(folder / name)
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            warn(f"{error}; an older one is used if there is one, else the run starts over")
    return None


def optimizer_to(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """An optimizer's state dict with its tensors on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return [move(item) for item in value] if isinstance(value, list) else value

    moved: dict[str, Any] = move(state)
    return moved
