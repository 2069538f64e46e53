"""Data in the cloud: s3://, gs://, hf:// and whatever else fsspec knows, copied into the local cache before it is read.

The copy is compared with what lies there at every start: files that are new or changed are downloaded, those that are
gone are removed, all others are left as they are. A download that was broken off goes on where it was. Credentials are
those of the file system's own library (s3fs, gcsfs, huggingface_hub), which must be installed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from infer.program.atomic import replace_file

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)", re.ASCII)
PAGES = ("http", "https")  # a page lists no files
STATE = ("size", "ETag", "etag", "md5Hash", "crc32c", "blob_id", "oid", "mtime", "LastModified", "updated", "created")
"""What file systems say of a file that changes with its content."""
LIST = "files.json"
SAVED_EVERY = 100  # files
THREADS = 16


def is_cloud(path: str) -> bool:
    """Whether a path is an address of a file system in the cloud."""
    found = ADDRESS.fullmatch(path)
    return found is not None and found[1] not in PAGES


def local_copy(address: str, cache: Path, option: str) -> Path:
    """The local copy of a folder or file in the cloud, brought up to date; of several processes one downloads.

    cache: of encodings; copies are in its folder `cloud`. option: the setting that names the address, for messages.

    Raises:
        ValueError: there is nothing, it cannot be reached and no copy is whole, or its library is not installed.
    """
    from filelock import FileLock

    folder = cache / "cloud" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        return _update(address, folder, option)


def _update(address: str, folder: Path, option: str) -> Path:
    record = folder / LIST
    known: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {"whole": False, "files": {}}
    try:
        system, root = open_address(address, option)
        there = _list(system, root)
    except ValueError:
        raise
    except Exception as error:  # botocore's, gcsfs's and aiohttp's errors have no base in common
        if not known["whole"]:
            raise ValueError(
                f"{option} {address} cannot be listed ({said_of(error)}); check address and access"
            ) from error
        print(f"note: {address} cannot be reached ({said_of(error)}); its copy in {folder} is used", file=sys.stderr)
        return folder / str(known["path"])
    if not there:
        raise ValueError(f"{option} {address} holds no files, or is not there; check the spelling")
    files, single = folder / "files", "" in there
    if single:
        there = {PurePosixPath(root).name: there[""]}
    for name in there:
        if ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{option} {address} holds {name!r}, whose name leaves its folder; rename it")
    kept = {
        name: state for name, state in known["files"].items() if there.get(name) == state and (files / name).is_file()
    }
    wanted = [name for name in there if name not in kept]
    known = {
        "whole": False,
        "files": kept,
        "address": address,
        "path": f"files/{next(iter(there))}" if single else "files",
    }
    _save(record, known)
    for name in _names_in(files) - there.keys():
        (files / name).unlink()
    if wanted:
        print(f"{address}: downloading {len(wanted)} of {len(there)} files", file=sys.stderr)
    source = (lambda name: root) if single else (lambda name: f"{root.rstrip('/')}/{name}")
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = {name: pool.submit(_download, system, source(name), files / name) for name in wanted}
        for i, (name, job) in enumerate(jobs.items()):
            try:
                job.result()
            except Exception as error:
                _save(record, known)
                pool.shutdown(cancel_futures=True)
                raise ValueError(
                    f"{option} {address}: {name} cannot be downloaded ({said_of(error)}); run it again to go on"
                ) from error
            kept[name] = there[name]
            if i % SAVED_EVERY == SAVED_EVERY - 1:
                _save(record, known)
    known["whole"] = True
    _save(record, known)
    return folder / str(known["path"])


def open_address(address: str, option: str) -> tuple[Any, str]:
    """The file system and the path in it.

    Raises:
        ValueError: fsspec does not know it, or its library is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = address.partition("://")[0]
    try:
        system, root = url_to_fs(address)
    except ImportError as error:
        library = str(known_implementations.get(scheme, {}).get("class", "")).partition(".")[0] or scheme
        raise ValueError(
            f"{option} {address} is read by {library}, which is not installed: pip install {library}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{option} {address} is of no file system that fsspec knows ({said_of(error)}); check it"
        ) from error
    system.invalidate_cache()
    return system, str(root)


def _list(system: Any, root: str) -> dict[str, list[str]]:
    """What is said of each file below a path, by its name there; of a path that is a file, by the empty name."""
    found = system.find(root, detail=True)
    prefix = root.rstrip("/") + "/"
    return {
        name.removeprefix(prefix) if name.startswith(prefix) else "": [
            f"{key}={one[key]}" for key in STATE if key in one
        ]
        for name, one in found.items()
    }


def _download(system: Any, path: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    system.get_file(path, str(partial))
    partial.replace(file)


def _names_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def _save(record: Path, known: dict[str, Any]) -> None:
    content = json.dumps(known)
    replace_file(record, lambda path: path.write_text(content))


def said_of(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
