"""Processes of the project's commands that begin with the libraries imported, for tests of what such processes do.

Importing them costs seconds of CPU a start. Here one server a test process imports them once, in a process without
threads, and each command is a fork of it. A test of how a command starts takes subprocess instead.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

from infer.program.paths import ROOT

IMPORTED = ["train.loop.run", "infer.comparison.draw"]


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # Python 3.11's server imports nothing else, and says nothing of it
        patch.setenv("OMP_NUM_THREADS", "1")  # read once: several ranks with all cores each take minutes
        ensure_running()
    return context


def _become(command: Sequence[str], folder: str, environment: Mapping[str, str], out: str, terminal: bool) -> None:
    """What a fork does: the script's own code, under its own name, its words in a file or on a terminal of its own."""
    assert sys.modules.keys() >= set(IMPORTED)
    gc.freeze()
    if terminal:
        os.setsid()
        os.dup2(os.open(out, os.O_RDWR), 0)  # the first one that a session opens is its own: Ctrl-C goes to it
    file = os.open(out, os.O_WRONLY if terminal else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """A command that runs: `[script, *arguments]` in a folder, as subprocess.Popen would run it with Python.

    out: the file of its words; or a terminal, which the command has for its own.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], out: Path, terminal: bool = False
    ) -> None:
        self.out = out
        given = (list(command), str(folder), dict(environment), str(out), terminal)
        self.process = _server().Process(target=_become, args=given)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """The exit code, below 0 the signal that ended it; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, seconds: float) -> tuple[int, str]:
        """Its exit code and its words, once it has ended."""
        until = time.monotonic() + seconds
        self.process.join(seconds)
        code = self.poll()
        if code is None:
            self.process.kill()
        words = self.out.read_text()
        assert code is not None and time.monotonic() < until + 60, words
        return code, words


def ranks(count: int, command: Sequence[str], folder: Path, environment: Mapping[str, str], out: Path) -> list[Forked]:
    """A command on several ranks of one machine, with the environment that torchrun would give each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        given = {**environment, **{key: str(value) for key, value in own.items()}}
        started.append(Forked(command, folder, given, out.with_name(f"{out.name}-{rank}")))
    return started
