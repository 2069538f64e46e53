"""A run's folder copied to the cloud while it trains, so that a machine that is taken away takes nothing with it.

What changed is copied every half minute by a thread of the main process, and once more when the command ends, however
it ends; what is gone here is then removed there too. A copy that fails is tried again the next time: training goes on.
Where the run is not here, as on a new machine, it is brought back first, and the same command resumes it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from train.data.cloud import open_address, said_of
from train.state.checkpoint_names import checkpoint_steps

EVERY = 30.0  # seconds
State = tuple[int, int]
"""Of a file: size and time of its last change."""


@contextmanager
def mirrored(address: str | None, run: str, folder: Path) -> Iterator[bool]:
    """Within, a run's folder is brought back from, and copied to, `address`/`run`; address None: nothing is done.

    Yields: whether this process, the main one, has done so.

    Raises:
        ValueError: the file system is not known, its library is not installed, or what is there cannot be brought back.
    """
    if address is None or os.environ.get("RANK", "0") != "0":
        yield False
        return
    system, root = open_address(address, "mirror")
    there = f"{root.rstrip('/')}/{run}"
    bring_back(system, there, folder, address)
    sent: dict[str, State] = {}
    ended = threading.Event()
    thread = threading.Thread(target=_copy_on, args=(system, there, folder, sent, ended, address), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        ended.set()
        thread.join()
        try:
            copy_changed(system, there, folder, sent)
        except Exception as error:
            _say(f"{folder} could not be copied to {address} ({said_of(error)}); the same command tries again")


def _copy_on(
    system: Any, there: str, folder: Path, sent: dict[str, State], ended: threading.Event, address: str
) -> None:
    while not ended.wait(EVERY):
        try:
            copy_changed(system, there, folder, sent)
        except Exception as error:  # botocore's, gcsfs's and aiohttp's errors have no base in common
            _say(f"{folder} could not be copied to {address} ({said_of(error)}); it is tried again")


def bring_back(system: Any, there: str, folder: Path, address: str) -> None:
    """Download a run that is not here.

    Raises:
        ValueError: it cannot be downloaded, holds a name that leaves its folder, or has gone on further than the one
            that is here.
    """
    is_here = (folder / "config.yaml").exists()
    try:
        names = _names_there(system, there)
        if is_here:
            _check_newer(names, folder, address)
            return
        for name in names:
            if ".." in PurePosixPath(name).parts or "\\" in name:
                raise ValueError(f"mirror {address} holds {name!r}, whose name leaves its folder; take it out")
        if names:
            _say(f"{folder} is brought back from {address}: {len(names)} files")
        # config.yaml last: it says that all is here
        for name in sorted(names, key=lambda name: name == "config.yaml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{there}/{name}", str(folder / name))
    except ValueError:
        raise
    except Exception as error:
        if is_here:
            _say(f"{address} cannot be listed ({said_of(error)}); training goes on with what is here")
            return
        raise ValueError(
            f"{folder} cannot be brought back from mirror {address} ({said_of(error)}); mend that, or set mirror=null"
        ) from error


def _check_newer(names: set[str], folder: Path, address: str) -> None:
    """Raises:
    ValueError: the copy has gone on further than the run that is here, which would be copied over it.
    """
    found = (re.fullmatch(r"checkpoints/step-(\d+)/.+", name) for name in names)
    copied = max((int(each[1]) for each in found if each), default=0)
    here = max(checkpoint_steps(folder / "checkpoints"), default=0)
    if copied > here:
        raise ValueError(
            f"mirror {address} holds step {copied} of this run and {folder} step {here} at most: it has gone on "
            f"elsewhere; delete {folder} to have that brought back, or choose another name with run=..."
        )


def copy_changed(system: Any, there: str, folder: Path, sent: dict[str, State]) -> None:
    """Upload what is new or changed since it was sent, then remove what is gone here; `sent` is brought up to date.

    Raises:
        OSError: it cannot be uploaded.
    """
    here = _states(folder)
    for name, state in sorted(here.items(), key=lambda item: item[1][1]):
        if sent.get(name) == state:
            continue
        system.makedirs(f"{there}/{name}".rpartition("/")[0], exist_ok=True)
        try:
            system.put_file(str(folder / name), f"{there}/{name}")
        except FileNotFoundError:
            if (folder / name).exists():
                raise
            continue  # a checkpoint that was removed meanwhile
        sent[name] = state
    if not here:
        return
    for name in _names_there(system, there) - here.keys():
        system.rm_file(f"{there}/{name}")
        sent.pop(name, None)


def _states(folder: Path) -> dict[str, State]:
    """The files of a run by their names in it, without locks and what is being written."""
    found: dict[str, State] = {}
    for file in folder.rglob("*") if folder.is_dir() else ():
        name = file.relative_to(folder)
        if any(part.startswith(".") or ".partial" in part for part in name.parts) or file.suffix == ".lock":
            continue
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        if file.is_file():
            found[name.as_posix()] = status.st_size, status.st_mtime_ns
    return found


def _names_there(system: Any, there: str) -> set[str]:
    system.invalidate_cache()
    try:
        found = system.find(there)
    except FileNotFoundError:
        return set()
    prefix = system._strip_protocol(there).rstrip("/") + "/"
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
