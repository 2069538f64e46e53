"""Files that are whole or absent, whenever the program or the machine dies."""

import os
import shutil
from collections.abc import Callable
from glob import escape
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk: a file that was renamed is only then there after a power cut."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Have every file in a folder and in those below it reach the disk, and their names."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def clear_partials(folder: Path, name: str) -> None:
    """Remove what processes of this machine that were killed left of `name`: files and folders name.<pid>.partial."""
    for path in folder.glob(f"{escape(name)}.*.partial"):
        number = path.name.removeprefix(f"{name}.").removesuffix(".partial")
        if not number.isdecimal() or int(number) == os.getpid() or not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def replace_file(path: Path, save: Callable[[Path], object]) -> None:
    """Put what `save` writes in the place of `path`, or leave `path` as it was if anything fails.

    `save` is given another name in the same folder; the folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_partials(path.parent, f".{path.name}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
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
