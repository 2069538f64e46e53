"""Who has the GPU: a training has it for itself, and a drawing process that has nothing to do leaves when one begins.

Two files are locked, as the kernel unlocks them however a process ends: `training.lock` by every training (shared), and
`process.lock` by the one drawing process. So neither asks the other anything, and a training's steps cost nothing more.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO

from infer.resident.settings import FOLDER

TRAINING, PROCESS = FOLDER / "training.lock", FOLDER / "process.lock"
LONGEST = 180.0  # seconds that a training waits for the picture that is being drawn
NO_LOCKS = (ENOLCK, ENOSYS, EOPNOTSUPP)  # what a file system without locks says


def try_lock(handle: IO[bytes], kind: int) -> bool:
    """Take a file's lock if it is free; where the file system has none, it counts as free."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_held(file: Path) -> bool:
    """Whether another process holds a lock."""
    if not file.is_file():
        return False
    with file.open("r+b") as handle:  # NFS locks for writing what is open for writing alone, and for reading likewise
        return not try_lock(handle, fcntl.LOCK_SH if file == PROCESS else fcntl.LOCK_EX)


@contextmanager
def training_turn(say: Callable[[str], object]) -> Iterator[None]:
    """Within, this process trains: a drawing process ends after its picture, which is waited for."""
    FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TRAINING.open("a+b") as handle:
        end, said = time.monotonic() + LONGEST, False
        while not try_lock(handle, fcntl.LOCK_SH) and time.monotonic() < end:
            time.sleep(0.01)  # whoever looks whether one trains holds it for a moment
        while is_held(PROCESS) and time.monotonic() < end:
            if not said:
                say("the drawing process gives its memory back first")
                said = True
            time.sleep(0.1)
        yield


@contextmanager
def drawing_turn() -> Iterator[None]:
    """Within, this is the drawing process.

    Raises:
        ValueError: there is one already.
    """
    FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    with PROCESS.open("a+b") as handle:
        end = time.monotonic() + 1  # whoever looks whether there is one holds it for a moment
        while not try_lock(handle, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise ValueError(f"a drawing process runs in {FOLDER} already; ask that one, with resident=true")
            time.sleep(0.02)
        yield
