"""What is there in the place of pictures with captions, and the mend."""

import re
from pathlib import Path, PurePosixPath

from infer.program.absent import meant
from infer.program.paths import kind_of_file
from infer.sample.picture import SUFFIXES
from train.data.metadata import METADATA


def no_source(given: str) -> str:
    """What a path is that is neither a folder nor a table, and the mend; to be put behind the setting's name."""
    path = Path(given)
    if not path.exists():
        return f"{given!r} does not exist; {meant(given, 'set it to a folder of pictures with captions')}"
    suffix = path.suffix.lower()
    if path.name.lower() in METADATA:
        mend = f"is the list of captions; set it to its folder, {str(path.parent)!r}"
    elif suffix in SUFFIXES:
        mend = f"is a picture; set it to the folder that holds it with its caption, {str(path.parent)!r}"
    elif kind_of_file(path) == "archive":
        mend = "is an archive; unpack it, and set it to the folder of the pictures"
    else:
        mend = "is a file of a kind that is not read; set it to a folder of pictures with captions"
    return f"{str(path)!r} {mend}"


def no_caption(folder: Path, name: str) -> str:
    """How a picture gets its caption, behind "write one beside it": of a folder whose name kohya's scripts read, the
    setting that says the same."""
    own = folder / PurePosixPath(name).parent
    found = re.fullmatch(r"(\d+)_(.+)", own.name)
    if not found:
        return " (train/write_captions.py writes them)"
    return f"; kohya's {own.name} is here 'data.sources=[{{path:{own},repeats:{found[1]},caption:{found[2]}}}]'"
