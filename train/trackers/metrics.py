"""The one reader of files with one JSON object a line: metrics.jsonl and events.jsonl in a run's folder."""

import json
from pathlib import Path
from typing import Any


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a file, each an object with a `step`; none if there is no file. Torn lines are left out."""
    # what is no UTF-8 was damaged: its line is dropped, not the run
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [event for line in lines if (event := parse_event(line)) is not None]


def parse_event(line: str) -> dict[str, Any] | None:
    """A line's object with its `step`; None if it has none, as a line torn by a crash."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("step"), int | float) else None
