"""metadata.jsonl and metadata.csv: the captions of a folder's pictures, a line each, in any subfolder for what is below
it, as datasets' imagefolder reads them."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from infer.sample.edit import MOST
from train.data.names import Names
from train.data.source import Faults

METADATA = ("metadata.jsonl", "metadata.csv")
REFERENCES = "references"


class Listed(NamedTuple):
    """What a line of the metadata says of a picture."""

    file: str  # the metadata's name in the folder
    captions: list[str]
    references: tuple[str, ...] = ()  # names in the folder, as they are written there


def lists_in(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The metadata by the subfolder that it is of ("." is the whole folder)."""
    found: dict[str, str] = {}
    for name in files:
        path = PurePosixPath(name)
        if path.name.lower() in METADATA:
            within = str(path.parent)
            if within in found:
                first, second = sorted((PurePosixPath(found[within]).name, path.name), reverse=True)
                raise ValueError(f"{folder / within} holds both {first} and {second}; keep one of them")
            found[within] = name
    return found


def list_for(name: str, lists: dict[str, str]) -> str | None:
    """The metadata nearest to a picture, which should name it."""
    return next((lists[within] for parent in PurePosixPath(name).parents if (within := str(parent)) in lists), None)


def read_metadata(
    folder: Path, metadata: str, column: str, names: Names, listed: dict[str, Listed], faults: Faults
) -> None:
    """Add what a list says to `listed`, by the pictures' names in the folder."""
    file, within = folder / metadata, PurePosixPath(metadata).parent
    for number, entry in _read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file):
        try:
            file_name, captions, references = _check_line(entry, column)
            name = str(within / file_name)
            name = names.find(name) or name
            if name in listed:
                where = "" if listed[name].file == metadata else f", after {folder / listed[name].file}"
                raise ValueError(f"names {file_name!r} a second time{where}; keep one line a picture")
        except ValueError as error:
            faults.add(f"{file} line {number}", str(error))
            continue
        listed[name] = Listed(metadata, captions, tuple(str(within / each) for each in references))


def most_references(folder: Path) -> int:
    """The most references that one line of a folder's metadata.jsonl files names; 0 without any.

    Lines that are wrong are passed over: whoever reads the folder says so.
    """
    return _most_references(folder, folder.stat().st_mtime_ns) if folder.is_dir() else 0


@lru_cache(maxsize=64)
def _most_references(folder: Path, changed: int) -> int:
    found = 0
    for file in folder.rglob("metadata.jsonl"):
        for _, entry in _read_jsonl(file):
            named = entry.get(REFERENCES) if isinstance(entry, dict) else None
            found = max(found, len(named) if isinstance(named, list) else int(isinstance(named, str)))
    return min(found, MOST)


def _check_line(entry: Any, column: str) -> tuple[str, list[str], list[str]]:
    """The name, the captions and the references of one line; ValueError says what is wrong with it."""
    if not isinstance(entry, dict) or not {"file_name", column} <= entry.keys():
        said = repr(entry) if isinstance(entry, Exception) else f"{str(entry)[:60]!r}"
        raise ValueError(
            f"is not an object with file_name and {column} ({said}); "
            f'write {{"file_name": "a.png", "{column}": "a caption"}}, or set data.caption_column'
        )
    if None in entry:  # csv's name for cells beyond the header's
        raise ValueError("has more cells than the first line; put captions that hold commas in quotes")
    name, found = entry["file_name"], entry[column]
    captions = found if isinstance(found, list) else [found]
    if not isinstance(name, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"is not right: file_name and {column} must be text, or {column} a list of texts")
    given = entry.get(REFERENCES) or []
    references = given if isinstance(given, list) else [given]
    if column == REFERENCES or not all(isinstance(each, str) and each.strip() for each in references):
        raise ValueError(
            f'is not right: {REFERENCES} is a list of pictures, as in {{"file_name": "a.png", "{REFERENCES}": '
            '["before/a.png"]}'
        )
    if len(references) > MOST:
        raise ValueError(f"names {len(references)} references; a picture has {MOST} at most")
    for each in (name, *references):
        if Path(each).is_absolute() or ".." in Path(each).parts:
            raise ValueError(f"names {each!r}, outside its folder; name pictures within it")
    return Path(name).as_posix(), captions, [Path(each).as_posix() for each in references]


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):  # splitlines would split within captions
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # a number may be too long, too
                yield number, error


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for row in rows:
            # None stands for cells that are not there
            yield rows.line_num, {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:  # from there on nothing is sure
        line = rows.reader.line_num
        raise ValueError(f"{file} line {line} is no CSV ({error}); mend it, or use metadata.jsonl") from error


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); mend that") from error
