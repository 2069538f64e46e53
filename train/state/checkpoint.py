"""A run's state on disk: `checkpoints/step-000200/` holds the adapter, its average, the optimizer and where the run is.

Safetensors and JSON only, and never the base model. A checkpoint is written beside its place and renamed, so that it
is whole or absent; checksums tell one that was torn or altered afterwards, and the one before it is taken instead. It
is the state right after its step's update: the validation and the previews that are due there come after it.
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infer.program.atomic import sync_folder

ADAPTER, AVERAGE, OPTIMIZER, STATE = "adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Take the tensors out of nested containers; JSON stays, with each tensor's name in its place."""
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
            with (partial / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one: the run came here again
        partial.rename(target)
        sync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def retain(folder: Path, keep: int, best: list[int]) -> None:
    """Remove all checkpoints but the newest `keep` and those of the steps in `best`, and what killed processes left."""
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)
    for old in list_checkpoints(folder)[:-keep]:
        if _step(old) not in best:  # renamed first: one that is half removed is none
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial")))


def best_steps(folder: Path, losses: dict[str, float], count: int) -> list[int]:
    """The `count` steps of the lowest validation loss, of those that have a checkpoint; the earlier of equals."""
    there = [_step(path) for path in list_checkpoints(folder) if str(_step(path)) in losses]
    return sorted(there, key=lambda step: (losses[str(step)], step))[:count]


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond a step, from which the run goes on, so that they are not taken for its newest."""
    moved = []
    for path in list_checkpoints(folder):
        if _step(path) > step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; partial ones are none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The adapter's tensors, the optimizer's state dict, and the rest; averaged weights are `average` in the rest.

    Raises:
        ValueError: a file is absent, unreadable, or not what was written.
    """
    try:
        header = json.loads((path / STATE).read_text())
        sums = header["sha256"]
        names = [ADAPTER, OPTIMIZER, *([AVERAGE] if AVERAGE in sums else [])]
        contents = {name: (path / name).read_bytes() for name in names}
        found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        found[STATE] = hashlib.sha256(header["state"].encode()).hexdigest()
        if found != sums:
            raise ValueError("its checksums differ from what was written")
        state = json.loads(header["state"])
        optimizer = _restore(state.pop("optimizer"), load(contents[OPTIMIZER]))
        adapter = load(contents[ADAPTER])
        if AVERAGE in contents:
            state["average"] = load(contents[AVERAGE])
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error})") from error
    return adapter, optimizer, state


def find_checkpoint(folder: Path, name: str | None, warn: Any) -> Path | None:
    """The checkpoint of a name, or else the newest that is whole, or None; `warn` is told of each damaged one.

    Raises:
        ValueError: the named one is absent or damaged.
    """
    there = list_checkpoints(folder)
    if name is not None:
        if folder / name not in there:
            names = ", ".join(path.name for path in there) or "none"
            raise ValueError(f"resume is {name!r}, but the checkpoints in {folder} are: {names}; choose one, or null")
        read_checkpoint(folder / name)
        return folder / name
    for path in reversed(there):
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            warn(f"{error}; an older one is used if there is one, else the run starts over")
    return None


def optimizer_to(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The optimizer's tensors on the device where its parameters are."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return [move(item) for item in value] if isinstance(value, list) else value

    moved: dict[str, Any] = move(state)
    return moved
