"""A command in a pseudo-terminal, as a person sees it: progress bars drawn over themselves, Ctrl-C typed."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forked import Forked

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


def watch(
    command: Sequence[str], folder: Path, interrupt_after: str | None = None, seconds: float = 300, forked: bool = False
) -> Screen:
    """Run a command to its end; Ctrl-C is typed once `interrupt_after` stands on the screen.

    forked: the command, without its Python, is a fork of a process that has imported the libraries (forked.py).

    Raises:
        AssertionError: it took longer than `seconds`, or the text never came.
    """
    terminal, own = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in QUIET} | PASSIVE
    process: Forked | subprocess.Popen[bytes]
    if forked:
        process = Forked(command, folder, environment, Path(os.ttyname(own)), terminal=True)
    else:
        process = subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=lambda: _enter(own))
    seen, until, ended = b"", time.monotonic() + seconds, False
    while True:
        if select.select([terminal], [], [], 0.05)[0]:
            seen += os.read(terminal, 2**16)
        elif ended:
            break  # what it said last was read since
        ended = process.poll() is not None
        if interrupt_after is not None and interrupt_after.encode() in seen:
            os.write(terminal, b"\x03")
            interrupt_after = None
        assert time.monotonic() < until, seen.decode(errors="replace")
    os.close(terminal)
    os.close(own)
    code = process.poll()
    assert code is not None and interrupt_after is None, seen.decode(errors="replace")
    drawn = ([part for part in line.split("\r") if part.strip()] for line in seen.decode(errors="replace").split("\n"))
    return Screen(code, [parts[-1].rstrip() for parts in drawn if parts])


def _enter(own: int) -> None:
    """Make a terminal this process's own, as a shell's is."""
    os.setsid()
    fcntl.ioctl(own, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(own, number)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # ignored where tests run in the background
        signal.signal(number, signal.SIG_DFL)
