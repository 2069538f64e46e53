"""What a run is doing, read from what lies in its folder; nothing is held open and nothing is waited for."""

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from infer.adapter.read import FILE, read_notes
from train.state.latest import NAME as LATEST
from train.state.run_lock import DEAD_AFTER
from train.state.run_lock import NAME as LOCK

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
TAIL = 2**14  # bytes of metrics.jsonl that say how a run goes at present
LAST = 12  # lines at its end that are read
MOST = 2**20  # bytes of a small file; a larger one is not what was written here


def read_json(file: Path, most: int = MOST) -> dict[str, Any]:
    """A file's object; empty if it is absent, torn, of more than so many bytes, or no object."""
    try:
        with file.open("rb") as stream:
            said = json.loads(stream.read(most))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def alive(pid: Any, started: Any) -> bool:
    """Whether this machine still runs the process of that number that began then, in seconds since 1970."""
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 1
    except (psutil.Error, ValueError, TypeError, OverflowError):
        return False


def holder(folder: Path) -> tuple[dict[str, Any], bool]:
    """Who the run's lock names, and whether that process lives; empty if nobody trains."""
    lock = folder / LOCK
    said = read_json(lock)
    if not said:
        return {}, False
    if said.get("host") == socket.gethostname():
        return said, alive(said.get("pid"), said.get("started"))
    try:
        return said, time.time() - lock.stat().st_mtime < DEAD_AFTER
    except OSError:
        return said, False


def steps_of(folder: Path) -> int | None:
    """The number of steps that a run was asked for, without reading its whole config."""
    try:
        text = (folder / CONFIG).read_text(errors="replace")[:MOST]
    except OSError:
        return None
    found = re.search(r"^steps: (\d{1,9})$", text, re.MULTILINE)
    return int(found[1]) if found else None


def finished(folder: Path, steps: int | None) -> bool:
    file = folder / "adapter" / FILE
    if not file.is_file():
        return False
    try:
        return steps is None or read_notes(file).get("step") == steps
    except ValueError:
        return False


def tail(folder: Path) -> list[dict[str, Any]]:
    """The last entries of a run's figures, and the last validation before them; without torn lines."""
    try:
        with (folder / METRICS).open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL))
            lines = stream.read().split(b"\n")
    except OSError:
        return []
    lines = lines if size <= TAIL else lines[1:]
    validated = [line for line in lines[:-LAST] if b'"validation_loss"' in line]
    found = []
    for line in [*validated[-1:], *lines[-LAST:]]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _last(entries: list[dict[str, Any]], name: str) -> float | None:
    return next((_number(entry[name]) for entry in reversed(entries) if name in entry), None)


def state_of(folder: Path) -> dict[str, Any]:
    """A run's state (encoding, training, stopped, done, failed), its reason, progress, time left and last figures.

    A process that is gone without a word counts as failed.
    """
    steps, entries, latest = steps_of(folder), tail(folder), read_json(folder / LATEST)
    step = int(entries[-1]["step"]) if entries else 0
    who, lives = holder(folder)
    reason = None
    if lives:
        try:
            begun = (folder / METRICS).stat().st_mtime >= float(who.get("started", 0))
        except (OSError, ValueError, TypeError):
            begun = False
        state = "training" if begun else "encoding"
    elif who:
        state = "failed"
        reason = (
            "its process is gone without a word (killed, out of memory, or the machine stopped); going on starts from "
            "the last checkpoint"
        )
    elif latest.get("state") in ("failed", "stopped"):
        state, reason = latest["state"], latest.get("reason")
    elif finished(folder, steps):
        state = "done"
    else:
        state = "stopped"
    times = sorted(value for entry in entries if (value := _number(entry.get("seconds"))) is not None)
    pace = times[len(times) // 2] if times else None
    left = pace * (steps - step) if pace is not None and steps is not None and state == "training" else None
    return {
        "state": state,
        "reason": reason if isinstance(reason, str) else None,
        "step": step,
        "steps": steps,
        "loss": _last(entries, "loss"),
        "validation": _last(entries, "validation_loss"),
        "pace": pace,
        "left": left,
        "memory_gib": _last(entries, "memory_gib"),
        "began": _number(latest.get("began")),
    }
