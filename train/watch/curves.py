"""metrics.jsonl of any length -> curves of some hundred points, read on from where the last reading ended."""

import gc
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.watch.places import run_place
from train.watch.states import METRICS

POINTS = 800  # of a curve, each the mean of its steps
KEPT = 8  # runs whose figures are remembered
STEP_FIGURES = ("loss", "lr", "seconds", "gradient_norm", "memory_gib")
CHUNK = 2**24  # bytes read at once


@dataclass
class Figures:
    """What was read of one file so far."""

    inode: int = 0
    offset: int = 0
    last: bytes = b""
    """The line before the offset: another one there means another file."""
    steps: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STEP_FIGURES})
    validations: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)


_kept: OrderedDict[Path, Figures] = OrderedDict()
_lock = threading.Lock()


def read_figures(file: Path) -> Figures:
    """The figures of a file, only what was added since the last call being read."""
    with _lock:
        found = _kept.pop(file, None) or Figures()
        try:
            with file.open("rb") as stream:
                status = file.stat()
                if found.inode != status.st_ino or status.st_size < found.offset or not _same(stream, found):
                    found = Figures(status.st_ino)
                stream.seek(found.offset)
                while chunk := stream.read(CHUNK):
                    whole, newline, _ = chunk.rpartition(b"\n")
                    if not newline:
                        break  # a line that is being written
                    gc.disable()  # looking through so many new objects would take half of the time
                    try:
                        _add(found, whole)
                    finally:
                        gc.enable()
                    found.offset += len(whole) + 1
                    found.last = whole.rpartition(b"\n")[2] + b"\n"
                    stream.seek(found.offset)
        except FileNotFoundError:
            return Figures()
        _kept[file] = found
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        return found


def _same(stream: Any, found: Figures) -> bool:
    stream.seek(found.offset - len(found.last))
    return bool(stream.read(len(found.last)) == found.last)


def _add(found: Figures, lines: bytes) -> None:
    try:
        entries = json.loads(b"[" + b",".join(line for line in lines.split(b"\n") if line) + b"]")
    except (ValueError, RecursionError):  # one of them is torn
        entries = [entry for line in lines.split(b"\n") if (entry := _parsed(line)) is not None]
    known = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
    held_out = [entry for entry in known if "validation_loss" in entry or "validation_loss_ema" in entry]
    found.validations += held_out
    scored = [entry for entry in known if any(name.startswith("score_") for name in entry)]
    found.scores += scored
    measured = {id(entry) for entry in (*held_out, *scored)}
    updates = [entry for entry in known if id(entry) not in measured]
    found.steps += [entry["step"] for entry in updates]
    for name in STEP_FIGURES:
        column = [entry.get(name) for entry in updates]
        try:
            found.values[name] += np.array(column, float).tolist()  # None becomes NaN
        except (TypeError, ValueError):  # of another version
            found.values[name] += [value if isinstance(value, int | float) else np.nan for value in column]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def binned(steps: list[int], values: list[float], most: int = POINTS) -> dict[str, list[float | None]]:
    """Steps and values of any number -> at most `most` bins of equal counts: last step, mean, least and largest."""
    x, y = np.asarray(steps), np.asarray(values, float)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if not len(x):
        return {"step": [], "mean": [], "low": [], "high": []}
    width = -(-len(x) // most)
    starts = np.arange(0, len(x), width)
    counts = np.diff(np.append(starts, len(x)))
    return {
        "step": x[starts + counts - 1].tolist(),
        "mean": _rounded(np.add.reduceat(y, starts) / counts),
        "low": _rounded(np.minimum.reduceat(y, starts)),
        "high": _rounded(np.maximum.reduceat(y, starts)),
    }


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") for value in values]


def curves(name: str) -> dict[str, Any]:
    """The curves of a run: of the training in bins, and each validation with its loss by noise level."""
    found = read_figures(run_place(name) / METRICS)
    validations: list[dict[str, Any]] = []
    for entry in found.validations:
        levels = entry.get("validation_loss_by_level")
        one = {
            "step": entry["step"],
            "loss": entry.get("validation_loss"),
            "ema": entry.get("validation_loss_ema"),
            "levels": levels if isinstance(levels, list) else None,
        }
        if validations and validations[-1]["step"] == one["step"]:  # the adapter's and its average's are two lines
            validations[-1] |= {key: value for key, value in one.items() if value is not None}
        else:
            validations.append(one)
    return {
        "name": name,
        "count": len(found.steps),
        "training": {key: binned(found.steps, values) for key, values in found.values.items()},
        "validations": validations[-POINTS:],
        "scores": found.scores[-POINTS:],
    }
