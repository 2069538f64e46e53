"""Which pictures of a folder have no caption yet, the captions written beside them, and a table of all to review."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from infer.program.absent import meant
from infer.program.atomic import replace_file
from infer.sample.picture import SUFFIXES
from train.data.image_folder import SIDECARS
from train.data.metadata import METADATA

TABLE = "captions.csv"


@dataclass
class Picture:
    """A picture in the folder."""

    file: Path
    caption: str | None
    """The caption beside it; None if there is none."""
    new: bool = False
    """Whether the caption was written by this command just now."""


def list_pictures(folder: Path) -> list[Picture]:
    """Every picture in a folder, in the order of the names, with the caption that it has.

    Raises:
        ValueError: there is no such folder, it holds no pictures, or its captions are in a list.
    """
    if not folder.is_dir():
        raise ValueError(
            f"data.path {str(folder)!r} is no folder here; {meant(str(folder), 'set it to the folder of the pictures')}"
        )
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    listed = next((file for file in files if file.name.lower() in METADATA), None)
    if listed is not None:
        raise ValueError(
            f"{listed} lists the captions, and this command writes them beside the pictures; add lines to the list, or "
            "take it out of the folder"
        )
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not pictures:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); set data.path to the folder that does")
    same: dict[Path, Path] = {}
    for file in pictures:
        other = same.setdefault(file.with_suffix(""), file)
        if other != file:
            raise ValueError(
                f"{other} and {file} would share the caption {file.with_suffix('.txt')}; rename one of them"
            )
    return [Picture(file, _beside(file)) for file in pictures]


def _beside(file: Path) -> str | None:
    """The caption in a file beside a picture; an empty one counts as none."""
    for kind in SIDECARS:
        text = file.with_suffix(kind)
        if text.is_file():
            try:
                return text.read_text(encoding="utf-8-sig").strip() or None
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{text} cannot be read ({error}); write it again in UTF-8, or take it out") from error
    return None


def write_caption(picture: Picture, caption: str) -> None:
    """Write a picture's caption beside it, whole or not at all."""
    picture.caption, picture.new = caption, True
    replace_file(picture.file.with_suffix(".txt"), lambda path: path.write_text(f"{caption}\n", encoding="utf-8"))


def write_table(folder: Path, pictures: list[Picture]) -> Path:
    """The table of all pictures with their captions, and whether each is new."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["file_name", "caption", "written"])
    for picture in pictures:
        name = picture.file.relative_to(folder).as_posix()
        table.writerow([name, picture.caption or "", "now" if picture.new else "before"])
    file = folder / TABLE
    replace_file(file, lambda path: path.write_text(text.getvalue(), encoding="utf-8", newline=""))
    return file
