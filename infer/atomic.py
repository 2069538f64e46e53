"""Files that are whole or absent, whenever the program or the machine dies."""

import os
from collections.abc import Callable
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


def replace_file(path: Path, save: Callable[[Path], object]) -> None:
    """Put what `save` writes in the place of `path`, or leave `path` as it was if anything fails.

    `save` is given another name in the same folder; the folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
