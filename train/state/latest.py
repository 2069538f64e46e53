"""The latest start of a run, runs/<run>/latest.json: its command line, when it began, and how it ended.

    {"words": ["experiment=demo"], "ranks": 1, "began": 1764082000.1, "ended": 1764082100.2, "state": "stopped",
     "reason": "SIGTERM"}

state: running, done, stopped or failed. A process that was killed says nothing: the state stays `running`, and the
run's lock file names a holder that is gone. Nothing reads it while training: it is for whoever watches.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file
from infer.program.errors import STOPPED, reason
from infer.program.secrets import hide

NAME = "latest.json"


@contextmanager
def recorded(folder: Path, ranks: int, stopped_by: Callable[[], str | None]) -> Iterator[None]:
    """Within, the run is running; afterwards the file says how it ended. Call on the main rank, with the run locked.

    stopped_by: what asked the run to stop.
    """
    said: dict[str, Any] = {"words": [hide(word) for word in sys.argv[1:]], "ranks": ranks, "began": time.time()}
    _write(folder, said | {"ended": None, "state": "running", "reason": None})
    state, why = "done", None
    try:
        yield
        if stopped_by() is not None:
            state, why = "stopped", stopped_by()
    except SystemExit as left:
        state, why = ("stopped", stopped_by()) if left.code == STOPPED else ("failed", f"exit code {left.code}")
        raise
    except KeyboardInterrupt:
        state, why = "stopped", "Ctrl-C"
        raise
    except Exception as error:
        state, why = "failed", hide(reason(error) or f"a defect: {type(error).__name__}: {error}")
        raise
    finally:
        _write(folder, said | {"ended": time.time(), "state": state, "reason": why})


def _write(folder: Path, said: dict[str, Any]) -> None:
    replace_file(folder / NAME, lambda path: path.write_text(json.dumps(said)))
