"""Files that are whole or absent, whenever the program or the machine dies."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from glob import escape
from pathlib import Path

STALE = 24 * 3600.0  # seconds after its last write at which a partial of another machine counts as abandoned


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk: until then a power cut can lose a file that was renamed."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Write every file in a folder and in those below it to the disk, and their names."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def partial_of(path: Path) -> Path:
    """The name under which `path` is written until it is whole: with this machine's name and this process's number."""
    return path.with_name(f"{path.name}.{_host()}.{os.getpid()}.partial")


def clear_partials(folder: Path, name: str) -> None:
    """Remove the partial files and folders of `name` that killed processes left: name.<machine>.<pid>.partial.

    Whether a process of another machine (a shared folder, a container) is alive cannot be known here: its partials are
    removed a day after their last write.
    """
    for path in folder.glob(f"{escape(name)}.*.partial"):
        rest = path.name.removeprefix(f"{name}.").removesuffix(".partial")
        found = re.fullmatch(r"(?:(?P<host>[^.]+)\.)?(?P<pid>\d+)", rest)
        if found is None:  # of a longer name
            continue
        pid = int(found["pid"])
        if found["host"] == _host():
            left = pid == os.getpid() or not _alive(pid)
        else:
            left = time.time() - _written(path) > STALE
        if left:
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


def _host() -> str:
    """This machine's name without what a file's name, or a part of it between dots, cannot hold."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:32] or "-"


def _written(path: Path) -> float:
    """When a file, or anything in a folder, was last changed, in seconds since 1970; now, if it is gone already. Not by
    the time of modification, which a copy takes over from its original."""
    try:
        return max(each.lstat().st_ctime for each in (path, *path.rglob("*")))
    except OSError:
        return time.time()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def replace_file(path: Path, save: Callable[[Path], object]) -> None:
    """Replace `path` by what `save` writes, or leave it as it was if anything fails.

    `save` is given another name in the same folder; the folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_partials(path.parent, f".{path.name}")
    temporary = partial_of(path.with_name(f".{path.name}"))
    try:
        save(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # what an open file's write or fsync raises names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
