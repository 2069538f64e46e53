"""Files of one JSON object a line: metrics.jsonl, what was measured, and events.jsonl, what was out of the ordinary."""

import json
import math
import os
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file
from train.trackers.metrics import parse_event


class Journal:
    """One line an event, with its step. A resumed run drops the lines beyond its checkpoint first."""

    def __init__(self, file: Path, step: int, write: bool) -> None:
        """step: of the checkpoint that the run goes on from, -1 for none. write: whether this rank writes."""
        self.file = file if write else None
        if write and file.is_file():
            text = file.read_text(errors="replace")  # a line that was damaged is dropped, not the run
            lines = [line for line in text.splitlines() if _step_of(line) <= step]
            replace_file(file, lambda path: path.write_text("".join(f"{line}\n" for line in lines)))

    def log(self, step: int, figures: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": step, **figures}, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Have all lines reach the disk, as before a checkpoint that stands for them."""
        if self.file is not None and self.file.is_file():
            with self.file.open("rb") as stream:
                os.fsync(stream.fileno())


def _step_of(line: str) -> float:
    """The step, or half a step more for what is done after the step's checkpoint; infinite for a torn line."""
    event = parse_event(line)
    if event is None:
        return math.inf
    return float(event["step"]) + (0.5 if any(key.startswith("validation") for key in event) else 0)
