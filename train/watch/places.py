"""What the page may read: files of runs/ and of the data folders that were named. No name leads out of them.

Every name that a request brings goes through here. A part of a name that is empty, begins with a dot or holds a
separator is refused before the disk is asked; what is left must, links followed, still lie within the folder.
"""

from pathlib import Path

from infer.program.run_names import FOLDERS, check_run_name
from infer.sample.picture import SUFFIXES

PRIVATE = ".page"
"""The page's own folder in runs/: jobs and their logs."""


class RefusedError(ValueError):
    """A request for what is not there or may not be seen; its text is shown on the page."""


def runs_folder() -> Path:
    return Path("runs")


def within(folder: Path, name: str) -> Path:
    """A path in a folder.

    Raises:
        RefusedError: the name leads out of it, or is no plain one.
    """
    parts = name.split("/")
    wrong = any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts)
    if wrong or len(name) > 1000 or max(len(part.encode(errors="replace")) for part in parts) > 255:
        raise RefusedError(f"{name!a} is no name within {folder}")
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise RefusedError(f"{name!a} cannot be looked up ({error})") from error
    if not inside:
        raise RefusedError(f"{name!a} leads out of {folder}")
    return path


def run_place(name: str) -> Path:
    """Where a run's folder is, or will be.

    Raises:
        RefusedError: the name is no run's.
    """
    try:
        check_run_name(name)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return within(runs_folder(), name)


def run_folder(name: str) -> Path:
    """The folder of a run that is there.

    Raises:
        RefusedError: there is none of that name.
    """
    folder = run_place(name)
    if not folder.is_dir():
        raise RefusedError(f"there is no run {name!a}: it was deleted or renamed meanwhile")
    return folder


def is_private(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


def data_folders(named: list[str]) -> dict[str, Path]:
    """The folders of pictures that may be shown, by what is written as data.path: those that were named, and those in
    runs/ that hold captions or pictures and are no run."""
    found = {folder: Path(folder) for folder in named}
    runs = runs_folder()
    if runs.is_dir():
        for each in sorted(runs.iterdir()):
            if each.name.startswith(".") or each.name in ("cache", *FOLDERS) or not each.is_dir():
                continue
            if (each / "config.yaml").exists() or (each / "latest.json").exists() or each.is_symlink():
                continue
            if _holds_pictures(each):
                found[str(each)] = each
    return found


def _holds_pictures(folder: Path) -> bool:
    try:
        return any(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir())
    except OSError:
        return False


def data_folder(named: list[str], name: str) -> Path:
    """One of those folders.

    Raises:
        RefusedError: it is none of them.
    """
    folders = data_folders(named)
    if name not in folders:
        raise RefusedError(
            f"{name!a} is no folder that this page may show; start it again with folders=[that/folder], or put the "
            "pictures in a folder directly within runs/"
        )
    if not folders[name].is_dir():
        raise RefusedError(f"{name!a} is not there any more")
    return folders[name]
