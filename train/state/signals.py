"""SIGINT and SIGTERM: the step is finished and the state saved before the run ends; a second one ends it at once.

`accelerate launch` with one process dies of the signal, of Ctrl-C with a traceback, and tells its child nothing; the
child sees that it is gone and stops as if it had been told. `python train/train.py` needs no launcher. torchrun, which
`accelerate launch` uses for several processes, passes signals on.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import psutil

from infer.program.errors import STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RELAY = 2.0  # seconds within which a launcher's copy of a signal may come


def _launcher() -> int | None:
    """The process that started this one, if it is there only for that."""
    try:
        parent = psutil.Process(os.getppid())
        words = " ".join(parent.cmdline())
    except psutil.Error:
        return None
    return parent.pid if any(word in words for word in ("accelerate", "torchrun", "torch.distributed")) else None


class Stop:
    """Catches the signals in a with-block. Until `gently` is called, one ends the program with exit code 3."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """What asked, once something has."""
        self.gentle = False
        self.since = 0.0
        self.launcher = _launcher()
        # a terminal's Ctrl-C reaches every process, and torchrun then sends its own
        self.relayed = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "Stop":
        # elsewhere Python lets no handler be set, and whoever made the thread has its own
        self.before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def gently(self) -> None:
        """From now on a first signal is only remembered: `wanted` says so."""
        self.gentle = True

    def _catch(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked is None:
            self._ask(name)
            if not self.gentle:
                sys.exit(STOPPED)
            if not self.relayed:
                for other in SIGNALS:  # the kernel's own: at once even where Python does not get to run
                    signal.signal(other, signal.SIG_DFL)
        elif time.monotonic() - self.since > RELAY:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _ask(self, name: str) -> None:
        self.asked, self.since = name, time.monotonic()
        what = "this step is finished and saved first; once more ends it at once" if self.gentle else "nothing is lost"
        if self.gentle and self.launcher is not None and not self.relayed:
            what += ". The launcher leaves before that, with a traceback of its own: wait for `stopped`"
        os.write(2, f"\n{name}: stopping; {what}\n".encode())  # print may be what was interrupted

    def wanted(self) -> bool:
        """Whether this process was asked to stop, or its launcher is gone."""
        if self.asked is None and self.launcher is not None and os.getppid() != self.launcher:
            self._ask("the launcher is gone")
        return self.asked is not None
