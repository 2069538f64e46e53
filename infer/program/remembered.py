"""Hashes and other facts about large files, kept so that a second start reads none of the files.

A file counts as unchanged while its device, inode, size, mtime and ctime are the same; no program can set ctime back.
One JSON file for each cache folder holds all facts; a process that adds some replaces the whole file, under a lock. A
fact that is absent is found again, so the file may be deleted at any time; `train/cache.py recheck=true` does that.
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file

NAME = "files.json"
RECENT = 2.0  # seconds: what was changed so lately may change again within one tick of its file system's clock


class Remembered:
    """The memory of one cache folder. `value` may be called by several threads."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.known = _read(self.file)
        self.new: dict[str, dict[str, Any]] = {}

    def value(self, path: Path, what: str, find: Callable[[], str]) -> str:
        """What `find` returns, which reads the file; or what it returned when the file was last read.

        what: names what is found out, and all that it depends on beside the file.
        """
        try:
            name, before = str(path.absolute()), _identity(path)
        except OSError:
            return find()  # which says what is wrong with the file
        entry = self.known.get(name)
        if entry is not None and entry["identity"] == before and what in entry["values"]:
            return str(entry["values"][what])
        found = find()
        changed = max(before[3:]) / 1e9
        if _identity(path) == before and time.time() - changed > RECENT:
            kept = entry["values"] if entry is not None and entry["identity"] == before else {}
            self.known[name] = self.new[name] = {"identity": before, "values": kept | {what: found}}
        return found

    def sha256(self, path: Path) -> bytes:
        """The SHA-256 of a file's content."""

        def find() -> str:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

        return bytes.fromhex(self.value(path, "sha256", find))

    def save(self) -> None:
        """Add what is new to the file, and take out what is of files that are gone."""
        if not self.new:
            return
        with _locked(self.file):
            entries = _read(self.file)
            for name, entry in self.new.items():
                other = entries.get(name)
                if other is not None and other["identity"] == entry["identity"]:
                    entry = entry | {"values": other["values"] | entry["values"]}
                entries[name] = entry
            entries = {name: entry for name, entry in entries.items() if Path(name).exists()}
            content = json.dumps(entries, separators=(",", ":"))
            replace_file(self.file, lambda path: path.write_text(content))
        self.new = {}


def forget(folder: Path) -> None:
    """Have everything in a cache folder's memory be read again."""
    (folder / NAME).unlink(missing_ok=True)


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The entries; none where the file is absent or not what was written here."""
    try:
        entries = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {name: entry for name, entry in entries.items() if _whole(entry)}


def _whole(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("identity"), list)
        and isinstance(entry.get("values"), dict)
        and all(isinstance(value, str) for value in entry["values"].values())
    )


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Within, no other process adds to the file. Where the file system has no locks, what another one adds meanwhile
    may be lost, and is found out again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                raise
        yield
