"""Lists of captions as pieces of text: metadata.jsonl a line each, metadata.csv a record each, which may span lines.

Only the piece of one picture is written anew; all others, a byte order mark and the ends of lines stay as they are.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from train.data.metadata import METADATA
from train.watch.places import RefusedError

COLUMN = "text"


def is_list(file: Path) -> bool:
    return file.name.lower() in METADATA


def read_whole(file: Path) -> str:
    """A file's text with its line ends and byte order mark.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{file} cannot be read ({error}); mend that first") from error


def pieces(file: Path) -> list[str]:
    """A list's pieces, each with the end of its last line.

    Raises:
        RefusedError: it cannot be read.
    """
    lines = list(io.StringIO(read_whole(file), newline=""))
    return lines if file.suffix.lower() != ".csv" else [piece for piece, _ in _records(file, lines)]


def _records(file: Path, lines: list[str]) -> list[tuple[str, list[str]]]:
    """Each record of a table as it stands in the file, with its cells."""
    bare = [lines[0].removeprefix("\ufeff"), *lines[1:]] if lines else []
    reader, found, before = csv.reader(iter(bare), strict=True), [], 0
    try:
        for cells in reader:
            found.append(("".join(lines[before : reader.line_num]), cells))
            before = reader.line_num
    except csv.Error as error:
        raise RefusedError(f"{file} is no CSV from line {reader.line_num} on ({error}); mend it first") from error
    return found


def changed_piece(file: Path, name: str, texts: list[str]) -> tuple[str, str]:
    """The piece of a picture, and what takes its place with other captions. name: as the list says it.

    Raises:
        RefusedError: there is no such piece, or captions of this number cannot stand in it.
    """
    find = _changed_record if file.suffix.lower() == ".csv" else _changed_line
    found = find(file, name, texts)
    if found is None:
        raise RefusedError(f"{file} has no line for {name} in a form that is changed here; mend it there")
    return found


def _changed_line(file: Path, name: str, texts: list[str]) -> tuple[str, str] | None:
    for line in pieces(file):
        bare = line.removeprefix("\ufeff").rstrip("\r\n")
        try:
            entry: Any = json.loads(bare) if bare.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("file_name") == name and COLUMN in entry:
            new = entry | {COLUMN: texts if isinstance(entry[COLUMN], list) or len(texts) > 1 else texts[0]}
            return line, _around(line, json.dumps(new, ensure_ascii=False))
    return None


def _changed_record(file: Path, name: str, texts: list[str]) -> tuple[str, str] | None:
    if len(texts) > 1:
        raise RefusedError(f"{file.name} holds one caption a picture; write one")
    records = _records(file, list(io.StringIO(read_whole(file), newline="")))
    head = records[0][1] if records else []
    if "file_name" not in head or COLUMN not in head:
        return None
    where, what = head.index("file_name"), head.index(COLUMN)
    for piece, cells in records[1:]:
        if len(cells) == len(head) and cells[where] == name:
            stream = io.StringIO()
            # with its own line end: a line break within a cell is quoted only where the line's end is such a character
            csv.writer(stream).writerow([*cells[:what], texts[0], *cells[what + 1 :]])
            return piece, _around(piece, stream.getvalue().removesuffix("\r\n"))
    return None


def _around(piece: str, content: str) -> str:
    """A piece's new content with the mark at its begin and the line's end that it had."""
    end = piece[len(piece.rstrip("\r\n")) :]
    return ("\ufeff" if piece.startswith("\ufeff") else "") + content + end


def with_piece(file: Path, before: str, after: str) -> str:
    """A list's text with one piece in the place of another.

    Raises:
        RefusedError: that one is not there once.
    """
    there = pieces(file)
    if there.count(before) != 1:
        raise RefusedError(f"{file} was changed meanwhile; nothing was written")
    return "".join(after if piece == before else piece for piece in there)
