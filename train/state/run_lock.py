"""One process per run: a lock file in the run's folder that names its holder.

    {"host": "node7", "pid": 4242, "started": 1764082000.1, "token": "9f0c..."}

On one machine the kernel knows whether the holder is alive: it releases the file's lock when the process ends, however
it ends. Not every network file system passes that on to other machines, so the holder also touches the file every few
seconds, and a lock file that was not touched for minutes is taken over.

filelock does not replace it: its FileLock has neither a heartbeat nor a holder's name, and its SoftFileLease uses no
lock of the kernel and takes over from another machine only after it has watched the file for the whole lease itself.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO, Any

import psutil

NAME = ".lock"
HEARTBEAT = 15.0  # seconds between two touches of the file
DEAD_AFTER = 300.0  # seconds without a touch after which a holder on another machine counts as dead


def _read_holder(handle: IO[str]) -> dict[str, Any] | None:
    """The holder that the file names; None if the file is empty, as after a run that ended, or torn."""
    handle.seek(0)
    try:
        holder = json.loads(handle.read())
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "started": float(holder["started"])}
    except (ValueError, KeyError, TypeError):
        return None


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether this machine still runs that process; its number alone may belong to another process by now."""
    try:
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1)
    except psutil.Error:
        return False


def _seconds_since_touch(handle: IO[str]) -> float:
    """Seconds since the last touch, by the file system's clock, since the clocks of two machines may differ."""
    probe = Path(handle.name).with_name(f"{NAME}.{os.getpid()}")
    probe.write_bytes(b"")
    try:
        return probe.stat().st_mtime - os.fstat(handle.fileno()).st_mtime
    finally:
        probe.unlink()


def _refusal(folder: Path, holder: dict[str, Any] | None, seen: str = "") -> ValueError:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return ValueError(f"{who} is training in {folder}{seen}; wait for it, stop it, or choose another name with run=...")


def _acquire(folder: Path, handle: IO[str]) -> str | None:
    """Lock the file; returns what to say of a holder that has died.

    Raises:
        ValueError: another process holds it.
    """
    kernel_locks = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(folder, _read_holder(handle)) from error
    except OSError as error:
        if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
            raise
        kernel_locks = False  # this file system has none: only the file's content says who holds it
    holder = _read_holder(handle)
    if holder is None:
        return None
    who = f"process {holder['pid']} on {holder['host']}"
    if holder["host"] == socket.gethostname():
        if not kernel_locks and _is_alive(holder):
            raise _refusal(folder, holder)
        return f"{who} held the run and is gone; going on"
    age = _seconds_since_touch(handle)
    if age < DEAD_AFTER:
        seen = f" (its last sign of life is {age:.0f} s old; after {DEAD_AFTER:.0f} s it counts as dead)"
        raise _refusal(folder, holder, seen)
    return f"{who} held the run and has given no sign of life for {age:.0f} s; going on in its place"


class RunLock:
    """A run's lock file, held by this process for as long as the file names it."""

    def __init__(self, file: Path, handle: IO[str]) -> None:
        self.file, self.handle = file, handle
        self.content = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": psutil.Process().create_time(),
                "token": secrets.token_hex(8),
            }
        )
        handle.seek(0)
        handle.truncate()
        handle.write(self.content)
        handle.flush()
        os.fsync(handle.fileno())
        self.released = threading.Event()
        self.heartbeat = threading.Thread(target=self._touch_file, name="lock", daemon=True)
        self.heartbeat.start()

    def _touch_file(self) -> None:
        while not self.released.wait(HEARTBEAT):
            os.utime(self.handle.fileno())

    def check(self) -> None:
        """Call before a checkpoint is written.

        Raises:
            ValueError: the file names another process, which took this one for dead, as after a long sleep.
        """
        try:
            content = self.file.read_text()
        except FileNotFoundError:
            content = ""
        if content != self.content:
            raise ValueError(
                f"{self.file} no longer names this process: another one took the run over, or the file was deleted; "
                "nothing more was written. The same command goes on from the last checkpoint"
            )

    def release(self) -> None:
        self.released.set()
        self.heartbeat.join()
        if self.file.is_file() and self.file.read_text() == self.content:
            self.handle.truncate(0)
        self.handle.close()


@contextmanager
def lock_run(folder: Path, say: Callable[[str], object]) -> Iterator[RunLock]:
    """Lock the run's folder for the with-block; `say` is told of a holder that has died.

    Raises:
        ValueError: another process, on this machine or another one, trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAME
    handle = file.open("a+")
    try:
        note = _acquire(folder, handle)
    except BaseException:
        handle.close()
        raise
    if note:
        say(note)
    lock = RunLock(file, handle)
    try:
        yield lock
    finally:
        lock.release()
