"""Locks of a cache folder: processes that read and add hold it together, one that removes holds it alone, and what one
process is making no other makes.

The system takes every lock back from a process that ends, however it ends. A claim is a lock on one byte of one file,
at an offset that follows from the item's key. Where a file system has no locks, every claim is granted: then two
processes may make the same item, which costs time and nothing else.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN, ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO

LOCK = ".lock"
CLAIMS = ".claims"
NO_LOCKS = (ENOLCK, ENOSYS, EOPNOTSUPP)  # the file system has none
TAKEN = (EACCES, EAGAIN)  # another process has it


def hold(folder: Path, alone: bool = False) -> IO[bytes]:
    """Hold the folder until the returned file is closed or the process ends: with others, to read and add, or alone.

    With others: waits while one process holds it alone, which never takes long. Alone: does not wait.

    Raises:
        ValueError: alone is asked for while others hold it, or where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError as error:
        lock.close()
        raise ValueError(
            f"{folder} is in use by another process, which may need what would be removed; wait until it ends"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise
        if alone:  # reading and adding are safe without a lock: only who removes must know that nobody else is there
            lock.close()
            raise ValueError(
                f"the file system of {folder} has no locks, so that nobody can tell whether it is in use; "
                "delete the whole folder instead, while nothing runs"
            ) from error
    return lock


def open_claims(folder: Path) -> IO[bytes]:
    """The file that a folder's claims are locks on; closing it gives up all of this process's claims."""
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / CLAIMS).open("ab")


def claim(claims: IO[bytes], key: str) -> bool:
    """Claim an item by its key, a hexadecimal hash; False if another process has claimed it. Does not wait."""
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(key))
    except OSError as error:
        if error.errno in TAKEN:
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True


def give_up(claims: IO[bytes], key: str) -> None:
    """Let other processes claim an item again: it is written, or will not be."""
    try:
        fcntl.lockf(claims, fcntl.LOCK_UN, 1, _offset(key))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextmanager
def claim_all(claims: IO[bytes]) -> Iterator[bool]:
    """Within the with-block, whether this process has claimed every item: nobody else is making anything here.

    To be called before anything else is claimed, as it gives up everything at its end. False too where the file system
    has no locks.
    """
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*TAKEN, *NO_LOCKS):
            raise
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(claims, fcntl.LOCK_UN)


def _offset(key: str) -> int:
    return int(key[:15], 16)  # 60 bits; a file has offsets up to 2^63
