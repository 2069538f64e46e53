"""Files that are whole or absent, whenever the program dies."""

import os
from collections.abc import Callable
from pathlib import Path


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
    except OSError as error:
        error.filename = error.filename or str(path)  # what an open file's write or fsync raises names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
