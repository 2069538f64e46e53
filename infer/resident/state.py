"""What the drawing process does, for whoever watches: runs/.resident/state.json.

    {"state": "waiting", "model": "dev, nf4", "device": "NVIDIA H200", "bytes": 9663676416, "pid": 4242,
     "changed": 1764082000.1, "idle": 600.0, "reason": null}

state: drawing, waiting or ended. A process that was killed says nothing: the state stays what it was, and
process.lock is free.
"""

import json
import os
import time
from typing import Any

from infer.program.atomic import replace_file
from infer.resident.settings import STATE
from infer.resident.turns import PROCESS, is_held


def write_state(state: str, **facts: Any) -> None:
    said = {"state": state, "pid": os.getpid(), "changed": time.time(), "reason": None} | facts
    replace_file(STATE, lambda path: path.write_text(json.dumps(said)))


def read_state() -> dict[str, Any] | None:
    """What it says, or `gone` as its state if it was killed; None if there was none since this folder was made."""
    try:
        said = json.loads(STATE.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("state"), str):
        return None
    if said["state"] != "ended" and not is_held(PROCESS):
        reason = (
            "the drawing process is gone without a word: it was killed, or memory ran out. The next one starts anew"
        )
        return said | {"state": "gone", "reason": reason}
    return said
