"""A folder of pictures with captions -> samples.

Captions come from metadata.jsonl or metadata.csv (a `file_name` and a text a line, as datasets' imagefolder reads them)
or from a .txt or .caption file beside each picture. Nothing outside of the folder is read: not by `../`, nor by an
absolute name, nor by a link. Files and folders whose names begin with a dot are no part of it.
"""

import csv
import errno
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from infer.paths import kind_of_file
from train.picture import SUFFIXES, UNREAD
from train.source import Faults, Sample, Source, clean

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")


def read_folder(source: Source, index: int, column: str, lines: bool, faults: Faults) -> list[Sample]:
    """The samples of a source that is a folder, in the order of their names.

    index: of the source. column: of the captions in the metadata. lines: each line of a sidecar is a caption.

    Raises:
        ValueError: it holds no pictures, its metadata cannot be read, or its masks' folder is not there.
    """
    for option, value in (("image_column", source.image_column), ("subset", source.subset)):
        if value is not None:
            raise ValueError(f"{option} of {source.path} is {value!r}, but that is a folder of pictures; leave it out")
    if source.split != "train":
        raise ValueError(f"split of {source.path} is {source.split!r}, but that is a folder of pictures; leave it out")
    folder = Path(source.path)
    masks = None if source.masks is None else Path(source.masks)
    if masks is not None and not masks.is_dir():
        raise ValueError(f"masks {source.masks!r} of {folder} is no folder; set it to the one that holds the masks")
    files = _list(folder, masks, faults)
    pictures = [name for name in files if _suffix(name) in SUFFIXES]
    if not pictures:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); set its path to the folder that does")
    metadata = [name for name in METADATA if name in files]
    if len(metadata) > 1:
        raise ValueError(f"{folder} holds both {' and '.join(metadata)}; keep one of them")
    listed = _read_metadata(folder / metadata[0], column, faults) if metadata else {}
    mask_of = {} if masks is None else _pair(pictures, masks, faults)

    samples = []
    for name in pictures:
        try:
            if metadata:
                found = listed.pop(name, None)
                missing = f'no line in {folder / metadata[0]}; add one with "file_name": {json.dumps(name)}'
            else:
                found = _read_sidecars(folder, name, files, lines)
                beside = PurePosixPath(name).with_suffix(".txt").name
                missing = f"no caption: write {beside} beside it, or a metadata.jsonl for all"
            captions = clean(found, source.caption, missing)
            if masks is not None and name not in mask_of:
                raise ValueError(f"has no mask in {masks}; put one there under the same name, white where all counts")
        except ValueError as error:
            faults.add(str(folder / name), str(error))
            continue
        file, mask = folder / name, None if masks is None else masks / mask_of[name]
        read_mask = None if mask is None else partial(read_bytes, str(mask))
        samples.append(Sample(str(file), captions, index, partial(read_bytes, str(file)), read_mask, file, mask))
    for name in listed:
        faults.add(str(folder / metadata[0]), f"names {name!r}, which is not in {folder}; add it or take the line out")
    return samples


def no_source(path: Path) -> str:
    """What a path is that is neither a folder nor a table, and the mend; to be put behind the setting's name."""
    if not path.exists():
        return f"{str(path)!r} does not exist; set it to a folder of pictures with captions"
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


def read_bytes(file: str) -> bytes:
    """A file's content.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); mend that, or take it out") from error


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _list(folder: Path, aside: Path | None, faults: Faults) -> dict[str, None]:
    """The files below a folder that may be read, by their names in it, in order; without those below `aside`."""
    root = folder.resolve()
    found = []
    for name, entry in _walk(folder, "", None if aside is None else aside.resolve()):
        readable = _suffix(name) in (*SUFFIXES, *SIDECARS) or name in METADATA
        if not readable and _suffix(name) not in UNREAD and not entry.is_dir():
            continue
        if entry.is_symlink() and _loops(entry):
            faults.add(entry.path, "is a link to itself; take it out")
        elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            faults.add(entry.path, f"is a link out of {folder}; put the file itself there, or take the link out")
        elif entry.is_dir():
            faults.add(entry.path, "is a link to a folder; give that folder as a source of its own, or take it out")
        elif not entry.is_file():
            faults.add(entry.path, "is no file; take it out")
        elif not readable:
            faults.add(entry.path, f"is of a format that is not read; save it as one of {', '.join(SUFFIXES)}")
        else:
            found.append(name)
    return dict.fromkeys(sorted(found, key=lambda name: name.split("/")))


def _loops(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to itself."""
    try:
        entry.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _walk(folder: Path, within: str, aside: Path | None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry below a folder that is no folder itself, with its name in the first one; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield within + entry.name, entry
            elif aside is None or Path(entry.path).resolve() != aside:
                yield from _walk(Path(entry.path), f"{within}{entry.name}/", aside)


def _pair(pictures: list[str], masks: Path, faults: Faults) -> dict[str, str]:
    """Each picture's mask: the file of the same name, or else of the same name but for its ending, where that is meant
    for no other picture."""
    there = [name for name in _list(masks, None, faults) if _suffix(name) in SUFFIXES]
    left = set(there) - set(pictures)
    by_stem = defaultdict(list)
    for name in there:
        if name in left:
            by_stem[PurePosixPath(name).with_suffix("")].append(name)
    stems = Counter(PurePosixPath(name).with_suffix("") for name in pictures)
    pairs = {name: name for name in set(there) & set(pictures)}
    for name in pictures:
        stem = PurePosixPath(name).with_suffix("")
        if name not in pairs and stems[stem] == 1 and len(by_stem[stem]) == 1:
            pairs[name] = by_stem[stem][0]
            left.discard(pairs[name])
    for name in sorted(left):
        faults.add(str(masks / name), "is the mask of no picture, or of more than one; give it its picture's full name")
    return pairs


def _read_sidecars(folder: Path, name: str, files: dict[str, None], lines: bool) -> list[str] | None:
    captions = []
    for suffix in SIDECARS:
        beside = str(PurePosixPath(name).with_suffix(suffix))
        if beside in files:
            try:
                text = _text(folder / beside)
            except ValueError as error:
                raise ValueError(f"has a broken caption: {error}") from error
            # splitlines would split within captions, at any of Unicode's separators
            captions += [line for line in text.split("\n") if line.strip()] if lines else [text]
    return captions or None


def _read_metadata(file: Path, column: str, faults: Faults) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, entry in _read_csv(file) if file.suffix == ".csv" else _read_jsonl(file):
        try:
            name, found = _check_line(entry, column)
            if name in captions:
                raise ValueError(f"names {name!r} a second time; keep one line a picture")
        except ValueError as error:
            faults.add(f"{file} line {number}", str(error))
            continue
        captions[name] = found
    return captions


def _check_line(entry: Any, column: str) -> tuple[str, list[str]]:
    """The name and the captions of one line; ValueError says what is wrong with it."""
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
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"names {name!r}, outside its folder; name pictures within it")
    return Path(name).as_posix(), captions


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(file).split("\n"), start=1):  # splitlines would split within captions
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # a number may be too long, too
                yield number, error


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    rows = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        for row in rows:
            # None stands for cells that are not there
            yield rows.line_num, {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:  # from there on nothing is sure
        line = rows.reader.line_num
        raise ValueError(f"{file} line {line} is no CSV ({error}); mend it, or use metadata.jsonl") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); mend that") from error
