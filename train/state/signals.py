"""SIGINT, SIGTERM and SIGHUP: the run finishes its step and saves its state before it ends; a second ends it at once.

`accelerate launch` with one process dies of the signal (of Ctrl-C with a traceback) and does not pass it on; its child
notices that the launcher is gone and stops as if it had got the signal. `python train/train.py` needs no launcher.
torchrun, which `accelerate launch` uses for several processes, passes signals on, and ends in a traceback too.

A closed terminal sends SIGHUP, and what is printed to it afterwards would raise: it goes nowhere. `nohup` has SIGHUP
ignored, and that stays so.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from infer.program.errors import STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COPY_WITHIN = 2.0  # seconds within which a launcher's copy of a signal may come


def _find_launcher() -> int | None:
    """The process id of the launcher that started this process, if one did."""
    try:
        parent = psutil.Process(os.getppid())
        words = " ".join(parent.cmdline())
    except psutil.Error:
        return None
    return parent.pid if any(word in words for word in ("accelerate", "torchrun", "torch.distributed")) else None


class StopSignals:
    """Catches the signals in a with-block. Until `defer` is called, a signal ends the program with exit code 3."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why the run stops: the signal's name, or that the launcher is gone; None while it goes on."""
        self.deferred = False
        self.requested_at = 0.0
        self.launcher = _find_launcher()
        # a terminal's Ctrl-C reaches every process, and torchrun then sends its own
        self.launcher_forwards = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "StopSignals":
        # Python allows handlers in the main thread alone
        self.before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():
            heard = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._catch) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a first signal is only remembered, and `requested` tells of it."""
        self.deferred = True

    def _catch(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is None:
            self._request(name)
            if not self.deferred:
                sys.exit(STOPPED)
            if not self.launcher_forwards:
                for other in self.before:  # the kernel acts at once, even while Python is busy in a library
                    signal.signal(other, signal.SIG_DFL)
        elif time.monotonic() - self.requested_at > COPY_WITHIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _request(self, name: str) -> None:
        self.reason, self.requested_at = name, time.monotonic()
        what = (
            "this step is finished and saved first; once more ends it at once" if self.deferred else "nothing is lost"
        )
        if self.deferred and self.launcher is not None:
            when = "The launcher ends" if self.launcher_forwards else "The launcher leaves before that,"
            what += f". {when} with a traceback of its own: wait for `stopped`"
        said = f"\n{name}: stopping; {what}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else ""
        for number, text in ((1, ""), (2, said)):
            try:
                os.write(number, text.encode())  # print may be what was interrupted
            except OSError:  # the terminal is gone
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), number)

    def requested(self) -> bool:
        """Whether a signal came, or the launcher is gone."""
        if self.reason is None and self.launcher is not None and os.getppid() != self.launcher:
            self._request("the launcher is gone")
        return self.reason is not None
