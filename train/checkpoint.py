"""A run's state on disk: `checkpoints/step-000200/` holds the adapter, the optimizer and where the run is.

Safetensors and JSON only. A checkpoint is written beside its place and renamed, so that it is whole or absent;
checksums tell one that was torn or altered afterwards, and the one before it is taken instead.
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
from safetensors.torch import load, save
from torch import Tensor

STATE = "state.json"


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
    folder: Path, step: int, adapter: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`."""
    tensors: dict[str, Tensor] = {}
    layout = _flatten(optimizer, tensors)
    files = {"adapter.safetensors": save(adapter), "optimizer.safetensors": save(tensors)}
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
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; partial ones are none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The adapter's tensors, the optimizer's state dict, and the rest.

    Raises:
        ValueError: a file is absent, unreadable, or not what was written.
    """
    try:
        header = json.loads((path / STATE).read_text())
        contents = {name: (path / name).read_bytes() for name in ("adapter.safetensors", "optimizer.safetensors")}
        found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        found[STATE] = hashlib.sha256(header["state"].encode()).hexdigest()
        if found != header["sha256"]:
            raise ValueError("its checksums differ from what was written")
        state = json.loads(header["state"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error})") from error
    optimizer = _restore(state.pop("optimizer"), load(contents["optimizer.safetensors"]))
    return load(contents["adapter.safetensors"]), optimizer, state


def read_latest(folder: Path, warn: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint that is whole, None if there is none; `warn` is told of each damaged one."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path)
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
