"""A disk that fails: within, the writes below a folder raise what a full, broken or read-only file system raises."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITES = ("open", "write", "fsync", "mkdir")
MOVES = ("replace", "rename")
REMOVES = ("unlink", "rmdir")
FAULTS = {
    # what each one hits: a full disk still renames and removes
    errno.ENOSPC: WRITES,
    errno.EDQUOT: WRITES,
    errno.EIO: (*WRITES, *MOVES, *REMOVES),
    errno.EROFS: ("open", "mkdir", *MOVES, *REMOVES),
    errno.EACCES: ("open", "mkdir", *MOVES, *REMOVES),
}


@dataclass
class Disk:
    """What happens below a folder, counted, and where it fails."""

    folder: Path
    number: int = 0
    """The error's number; 0 only counts."""
    at: int = 0
    """The operation that fails, from 1."""
    lasting: bool = False
    """All after it fail too."""
    log: list[str] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()

    def meet(self, what: str, path: Any) -> bool:
        """Count an operation; whether it fails."""
        own = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path
        place = Path(os.fsdecode(own)).absolute()
        if not place.is_relative_to(self.folder) or place == self.folder:
            return False
        self.log.append(what)
        count = len(self.log)
        hit = count == self.at or (self.lasting and count > self.at > 0)
        if hit and what in FAULTS.get(self.number, ()):
            self.failed += 1
            return True
        return False

    def refuse(self, what: str, path: Any) -> None:
        if self.meet(what, path):
            named = [os.fspath(path)] if not isinstance(path, int) else []
            raise OSError(self.number, os.strerror(self.number), *named)

    @contextmanager
    def mounted(self) -> Iterator["Disk"]:
        """Within, files are opened, written, renamed and removed through this."""
        names = ("fsync", "mkdir", *MOVES, *REMOVES)
        own: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in names}
        real_open = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = isinstance(mode, str) and bool(set(mode) & set("wax+"))
            if not writes or isinstance(file, int):
                return real_open(file, mode, *args, **kwargs)
            self.refuse("open", file)
            return Written(real_open(file, mode, *args, **kwargs), file, self)

        def through(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def called(path: Any, *args: Any, **kwargs: Any) -> Any:
                if kwargs.get("dir_fd") is None:  # shutil.rmtree's names are relative to a folder
                    self.refuse(what, path)
                return function(path, *args, **kwargs)

            return called

        patched: Any = opened
        io.open = builtins.open = patched
        for name, function in own.items():
            setattr(os, name, through(name, function))
        try:
            yield self
        finally:
            io.open = builtins.open = real_open
            for name, function in own.items():
                setattr(os, name, function)


class Written:
    """An open file whose writes can fail, half-way, as a full disk's do."""

    def __init__(self, file: Any, path: Any, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, content: Any) -> Any:
        if self._disk.meet("write", self._path):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise OSError(self._disk.number, os.strerror(self._disk.number))
        return self._file.write(content)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> "Written":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
