"""Processes that get ready side by side and are then timed one after another: both ends of that, without torch."""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def run_gang(running: dict[str, "subprocess.Popen[bytes]"], folder: Path, seconds: float) -> None:
    """Let them begin to be timed once all are ready, or late; return when all have ended."""
    start, begun = time.monotonic(), False
    while any(process.poll() is None for process in running.values()):
        waited_for = [p for p in running.values() if p.poll() is None and not (folder / f"{p.pid}.ready").exists()]
        if time.monotonic() - start > seconds:
            for process in running.values() if begun else waited_for:
                process.kill()
                process.wait()
            waited_for = []
        if not begun and not waited_for:
            (folder / "go").touch()
            start, begun = time.monotonic(), True
        time.sleep(0.1)


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """In a gang's worker: have the device alone, once all of the gang are ready for that."""
    if folder is None:
        yield
        return
    (folder / f"{os.getpid()}.ready").touch()
    while not (folder / "go").exists():
        if not folder.exists():
            raise RuntimeError("the benchmark that started this process is gone")
        time.sleep(0.1)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
