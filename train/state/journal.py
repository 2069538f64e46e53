"""Files with one JSON object per line: metrics.jsonl for figures, events.jsonl for spikes and skipped updates."""

import json
import math
import os
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file
from train.trackers.metrics import parse_event


class Journal:
    """One line per entry, with its step. A resumed run first removes the lines beyond its checkpoint."""

    def __init__(self, file: Path, step: int, write: bool) -> None:
        """step: the checkpoint's that the run resumes from, -1 without one. write: whether this rank writes."""
        self.file = file if write else None
        if write and file.is_file():
            text = file.read_text(errors="replace")  # a damaged line is removed, and the run goes on
            lines = [line for line in text.splitlines() if _order_of(line) <= step]
            replace_file(file, lambda path: path.write_text("".join(f"{line}\n" for line in lines)))

    def log(self, step: int, figures: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a") as handle:
                handle.write(json.dumps({"step": step, **figures}, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flush all lines to the disk; call before a checkpoint of the same step is written."""
        if self.file is not None and self.file.is_file():
            with self.file.open("rb") as handle:
                os.fsync(handle.fileno())


def _order_of(line: str) -> float:
    """The line's step; half a step more for a validation, which comes after the step's checkpoint; infinite for a line
    that a crash cut off."""
    event = parse_event(line)
    if event is None:
        return math.inf
    return float(event["step"]) + (0.5 if any(key.startswith("validation") for key in event) else 0)
