"""What a path may have meant at which nothing is: the mend behind "does not exist"."""

import os
import re
import unicodedata
from difflib import get_close_matches
from pathlib import Path

HUB_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)", re.ASCII
)


def meant(path: str, otherwise: str = "check the spelling") -> str:
    """The mend for a path that is not there.

    otherwise: what is said where nothing of its name tells more.
    """
    if found := HUB_ADDRESS.match(path):
        return f"write {found[1]}"
    if re.match(r"\w+://", path):
        return "an address like this is not read here: download it, and give the path of what was downloaded"
    if re.search(r"\$\w|\$\{|%\w+%", path):
        return "the shell puts a variable's value in its place only outside of single quotation marks"
    if path != path.strip() and Path(path.strip()).exists():
        return f"did you mean {path.strip()!r}, without the spaces around it?"
    if "\\" in path and Path(path.replace("\\", "/")).exists():
        return f"did you mean {path.replace(chr(92), '/')!r}?"
    if re.match(r"[A-Za-z]:[\\/]", path) and os.name == "posix":
        return f"within WSL Windows' disk {path[0]}: is the folder /mnt/{path[0].lower()}"
    near = _near(Path(path))
    return f"did you mean {str(near)!r}?" if near else otherwise


def _near(path: Path) -> Path | None:
    """The path that is there and is spelled almost so: in its first part that is not there."""
    there = path
    while not there.parent.is_dir():
        there = there.parent
        if there == there.parent:
            return None
    try:
        beside = {_plain(each.name): each for each in sorted(there.parent.iterdir())}
    except OSError:
        return None
    # an ending that many files have says nothing
    same = {_plain(each.stem): name for name, each in beside.items() if each.suffix.lower() == there.suffix.lower()}
    close = [same[stem] for stem in get_close_matches(_plain(there.stem), same, n=1, cutoff=0.75)]
    close = close or get_close_matches(_plain(there.name), beside, n=1, cutoff=0.9)
    if not close:
        return None
    whole = beside[close[0]] / path.relative_to(there)
    return whole if whole.exists() else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
