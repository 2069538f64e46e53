"""Names that users give and files are called by: of a run, which is its folder, and of a precision.

What is refused on one system is refused on all, since folders of runs are copied from machine to machine.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

FOLDERS = {
    "adapter",
    "adapter-ema",
    "checkpoints",
    "choose",
    "chosen",
    "compare",
    "drawn",
    "experiment",
    "gap",
    "images",
    "previews",
    "requests",
    "skipped",
    "tensorboard",
    "wandb",
}
"""Folders within a run's folder, whose names no run nested in it can have."""
FILES = (
    "config.yaml", "metrics.jsonl", "events.jsonl", "latest.json", "loss.png", "memory.yaml", "pictures.json",
    "plan.json", "point.json", "scores.json", "scores.png", "adapter.sha256", "data.html", "data.json", "report.html",
    "results.json", ".lock",
)  # fmt: skip
"""Files within a run's folder or a sweep's, likewise."""
JOINERS = "\u200c\u200d"
"""Letters without a shape that words of some languages and emoji have."""
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever the ending."""
LONGEST, DEEPEST = 200, 600  # bytes of a folder's name, and of the whole: names of files come behind them


def check_file_names(what: str, names: Iterable[str]) -> None:
    """Check that names can be parts of file names.

    Raises:
        ValueError: one cannot.
    """
    for name in names:
        if not re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", name) or unfit(name):
            reason = unfit(name) or "with other letters than a file's name can have everywhere"
            raise ValueError(
                f"{what} has the name {name!r}, which becomes a part of a file's, {reason}; choose a plain one"
            )


def check_run_name(run: str) -> Path:
    """The run's folder, runs/<run>.

    Raises:
        ValueError: the name would leave that folder, is what the folder of another run holds, or cannot be a folder's
            on every system.
    """
    if not run or run != run.strip() or run.startswith(".") or ".." in run:
        raise ValueError(f"run is {run!r}; choose a plain name such as mine-nf4")
    if Path(run).is_absolute():
        raise ValueError(f"run is {run!r}, a path; it is the name of a folder within runs/")
    parts = Path(run).parts
    for part in parts:
        reason = unfit(part)
        if reason is not None:
            raise ValueError(f"run is {run!r}, {reason}; choose a plain name such as mine-nf4")
    if len(run.encode()) > DEEPEST:
        raise ValueError(f"run is {run!r}, of {len(run.encode())} bytes; choose a name of at most {DEEPEST}")
    # where upper and lower case are one, on Windows and macOS, so are these
    first, *others = (part.casefold() for part in parts)
    taken = sorted(FOLDERS.intersection(others))
    if first == "cache" or taken:
        what = "the encoded pictures of all runs" if first == "cache" else f"what {taken[0]} of another run holds"
        raise ValueError(f"run is {run!r}, but that folder is for {what}; choose another name such as {first}-2")
    file = next((part for part in others if part in FILES), None)
    if file is not None:
        raise ValueError(f"run is {run!r}, but {file} is the name of a file in a run's folder; choose another name")
    return Path("runs") / run


def unfit(part: str) -> str | None:
    """Why a name cannot be a folder's on every system; None if it can."""
    if part.startswith("."):
        return f"where {part!r} would be hidden"
    if part != part.strip() or part.endswith("."):
        return f"where {part!r} begins or ends with a space, or ends with a dot, which Windows drops"
    odd = next((part[i] for i in range(len(part)) if part[i] in '\\:*?"<>|' or not _plain(part, i)), None)
    if odd is not None:
        return f"with {odd!r}, which not every system has in names"
    if DEVICES.fullmatch(part):
        return f"where {part!r} is a device's name on Windows"
    if len(part.encode()) > LONGEST:
        return f"where one folder's name has {len(part.encode())} bytes, and {LONGEST} is the most"
    return None


def _plain(part: str, i: int) -> bool:
    """Whether its letter i is seen, is a space, or joins two that are seen; controls and other marks that nobody sees
    are not, nor halves of pairs."""
    if part[i] in JOINERS:
        beside = part[max(i - 1, 0) : i], part[i + 1 : i + 2]
        return all(each and each.isprintable() and each != " " for each in beside)
    return part[i].isprintable() or unicodedata.category(part[i]) == "Zs"
