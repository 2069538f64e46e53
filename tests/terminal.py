"""A command in a pseudo-terminal, as a person sees it: progress bars drawn over themselves, Ctrl-C typed."""

import fcntl
import os
import pty
import re
import signal
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROWS, COLUMNS = 40, 110
# OpenMP's threads wait asleep: beside other work they would else burn three times the time that they compute
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
QUIET = ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "PYTHONWARNINGS")  # what tests set and a newcomer does not
ALARMING = re.compile(r"Traceback|Warning\b|warnings?\.warn|\bWARN(ING)?\b|deprecat|KeyboardInterrupt|^W\d{4} ", re.I)


@dataclass
class Screen:
    """What a command left on the terminal."""

    code: int
    """Its exit code; below 0, the signal that ended it."""
    lines: list[str]
    """Without the lines that stay empty; of a line that was drawn over, what was drawn last."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def alarming(self) -> list[str]:
        """Lines that frighten a newcomer: tracebacks, warnings, deprecations."""
        return [line for line in self.lines if ALARMING.search(line)]


def watch(command: Sequence[str], folder: Path, interrupt_after: str | None = None, seconds: float = 300) -> Screen:
    """Run a command to its end; Ctrl-C is typed once `interrupt_after` stands on the screen.

    Raises:
        AssertionError: it took longer than `seconds`, or the text never came.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        for name in QUIET:
            os.environ.pop(name, None)
        os.environ |= PASSIVE
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # ignored where tests run in the background
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], list(command))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    seen, until = b"", time.monotonic() + seconds
    while True:
        try:
            more = os.read(terminal, 2**16)
        except OSError:  # Linux says so when the last process has closed it
            break
        if not more:
            break
        seen += more
        if interrupt_after is not None and interrupt_after.encode() in seen:
            os.write(terminal, b"\x03")
            interrupt_after = None
        assert time.monotonic() < until, seen.decode(errors="replace")
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert interrupt_after is None, seen.decode(errors="replace")
    drawn = ([part for part in line.split("\r") if part.strip()] for line in seen.decode(errors="replace").split("\n"))
    return Screen(code, [parts[-1].rstrip() for parts in drawn if parts])
