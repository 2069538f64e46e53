"""Which of several processes makes what, so that two that build the same cache share the work.

A process claims what it is about to make and lets go of it once it is written. What another one has claimed is put off
to the end, when it is there, or its maker has ended without it. A claim is a lock on one byte of one file, at a place
that follows from the key; the system takes it back from a process that ends, however it ends. Where a file system has
no locks, everything is granted: then two may make the same thing, which costs time and nothing else.
"""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN, ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path

FILE = ".claims"


class Claims:
    """What this process has claimed in a folder, until close or the end of the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stream = (folder / FILE).open("ab")
        self.held: set[str] = set()

    def take(self, key: str) -> bool:
        """Claim a key, a hexadecimal hash; False if another process has it. Does not wait."""
        try:
            fcntl.lockf(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except OSError as error:
            if error.errno in (EACCES, EAGAIN):
                return False
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                raise
        self.held.add(key)
        return True

    @contextmanager
    def everything(self) -> Iterator[bool]:
        """Within, whether this process has claimed all that there may be: nobody else is making anything here. Call
        before anything else is claimed. False too where the file system has no locks."""
        assert not self.held, "letting go of everything would let go of these"
        try:
            fcntl.lockf(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN, ENOLCK, ENOSYS, EOPNOTSUPP):
                raise
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.stream, fcntl.LOCK_UN)

    def free(self, keys: Iterable[str]) -> None:
        """Let go of these: they are written, or given up."""
        for key in self.held.intersection(keys):
            try:
                fcntl.lockf(self.stream, fcntl.LOCK_UN, 1, _place(key))
            except OSError as error:
                if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                    raise
            self.held.remove(key)

    def close(self) -> None:
        """Let go of everything."""
        self.stream.close()
        self.held.clear()


def _place(key: str) -> int:
    return int(key[:15], 16)  # 60 bits; files have places up to 2^63
