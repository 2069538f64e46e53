"""One process a run: a lock in the run's folder that says who holds it.

    {"host": "node7", "pid": 4242, "started": 1764082000.1, "token": "9f0c..."}

On one machine the kernel knows whether the holder lives: it lets go of the file's lock when the process ends, however
it ends. That word does not reach other machines on every network file system, so the holder also touches the file from
time to time, and one that has not been touched for long is taken over.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO, Any

import psutil

NAME = ".lock"
BEAT = 15.0  # seconds between two touches
STALE = 300.0  # seconds without a touch after which a holder on another machine counts as dead


def _owner(stream: IO[str]) -> dict[str, Any] | None:
    """Who wrote the file; None if it is empty, as after a run that ended, or torn."""
    stream.seek(0)
    try:
        owner = json.loads(stream.read())
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "started": float(owner["started"])}
    except (ValueError, KeyError, TypeError):
        return None


def _lives(owner: dict[str, Any]) -> bool:
    """Whether this machine runs that process: its number alone may be another's by now."""
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1)
    except psutil.Error:
        return False


def _age(stream: IO[str]) -> float:
    """Seconds since the last touch, by the file system's own clock: two machines' clocks may differ."""
    probe = Path(stream.name).with_name(f"{NAME}.{os.getpid()}")
    probe.write_bytes(b"")
    try:
        return probe.stat().st_mtime - os.fstat(stream.fileno()).st_mtime
    finally:
        probe.unlink()


def _refusal(folder: Path, owner: dict[str, Any] | None, seen: str = "") -> ValueError:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return ValueError(f"{who} is training in {folder}{seen}; wait for it, stop it, or choose another name with run=...")


def _take(folder: Path, stream: IO[str]) -> str | None:
    """Take the file, or raise; returns what to say of a dead holder."""
    local = True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(folder, _owner(stream)) from error
    except OSError as error:
        if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
            raise
        local = False  # a file system without locks: what is written in the file must do
    owner = _owner(stream)
    if owner is None:
        return None
    who = f"process {owner['pid']} on {owner['host']}"
    if owner["host"] == socket.gethostname():
        if not local and _lives(owner):
            raise _refusal(folder, owner)
        return f"{who} held the run and is gone; going on"
    age = _age(stream)
    if age < STALE:
        seen = f" (its last sign of life is {age:.0f} s old; after {STALE:.0f} s it counts as dead)"
        raise _refusal(folder, owner, seen)
    return f"{who} held the run and has given no sign of life for {age:.0f} s; going on in its place"


class Hold:
    """A run that is ours for as long as the lock's file says so."""

    def __init__(self, file: Path, stream: IO[str]) -> None:
        self.file, self.stream = file, stream
        self.content = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": psutil.Process().create_time(),
                "token": secrets.token_hex(8),
            }
        )
        stream.seek(0)
        stream.truncate()
        stream.write(self.content)
        stream.flush()
        os.fsync(stream.fileno())
        self.ended = threading.Event()
        self.heart = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.heart.start()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            os.utime(self.stream.fileno())

    def check(self) -> None:
        """Call before the run's files are written.

        Raises:
            ValueError: another machine took this process for dead, as after a long sleep, and the run over.
        """
        try:
            there = self.file.read_text()
        except FileNotFoundError:
            there = ""
        if there != self.content:
            raise ValueError(
                f"{self.file} is no longer this process's: another one took the run over, or the file was deleted; "
                "nothing more was written. The same command goes on from the last checkpoint"
            )

    def end(self) -> None:
        self.ended.set()
        self.heart.join()
        if self.file.is_file() and self.file.read_text() == self.content:
            self.stream.truncate(0)
        self.stream.close()


@contextmanager
def hold_run(folder: Path, say: Any) -> Iterator[Hold]:
    """Hold the run's folder for the with-block; `say` is told of a dead holder.

    Raises:
        ValueError: another process, here or on another machine, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAME
    stream = file.open("a+")
    try:
        note = _take(folder, stream)
    except BaseException:
        stream.close()
        raise
    if note:
        say(note)
    hold = Hold(file, stream)
    try:
        yield hold
    finally:
        hold.end()
