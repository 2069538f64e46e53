"""A folder's pictures with their captions, as training reads them; captions changed in place, and changed back.

A caption is written to the file that it was read from: a .txt or .caption file beside the picture, its line of
metadata.jsonl, or its record of metadata.csv. Files are replaced whole. Every change is noted in
runs/.page/captions.jsonl with what was there before; undoing it puts that back, unless the file was changed by somebody
else since.
"""

import json
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from infer.program.atomic import replace_file
from infer.sample.picture import SUFFIXES
from train.data.dataset import Data
from train.data.image_folder import SIDECARS
from train.data.metadata import METADATA
from train.data.samples import read_samples
from train.watch.caption_lists import changed_piece, is_list, read_whole, with_piece
from train.watch.places import PRIVATE, RefusedError, runs_folder, within

LONGEST = 20_000  # letters of a caption
_writing = threading.Lock()


def list_pictures(folder: Path) -> dict[str, Any]:
    """The pictures of a folder with their captions, and what is wrong with others."""
    try:
        samples, skipped = read_samples(Data(str(folder), on_error="skip", validation=0.0))
    except ValueError as error:
        return {"pictures": [], "broken": [{"name": str(folder), "reason": str(error)}]}
    found = []
    for sample in samples:
        assert sample.file is not None
        name = sample.file.relative_to(folder).as_posix()
        found.append({"name": name, "captions": list(sample.captions)})
    named = [str(folder / "x")[:-1], str(folder)]
    broken = []
    for one in skipped:
        short = next((one.name.removeprefix(start) for start in named if one.name.startswith(start)), one.name)
        picture = PurePosixPath(short).suffix.lower() in SUFFIXES and (folder / short).is_file()
        broken.append({"name": short, "reason": one.reason, "picture": picture})
    return {"pictures": found, "broken": broken}


def _picture(folder: Path, name: str) -> Path:
    file = within(folder, name)
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        raise RefusedError(f"there is no picture {name!a}")
    return file


def _homes(folder: Path, name: str) -> list[Path]:
    """The files that say a picture's caption, or the .txt that may be made."""
    picture = _picture(folder, name)
    homes = [file for end in SIDECARS if (file := picture.with_suffix(end)).is_file()]
    for parent in PurePosixPath(name).parents:
        lists = [file for each in METADATA if (file := folder / parent / each).is_file()]
        if lists:
            homes += lists[:1]
            break
    return homes or [picture.with_suffix(".txt")]


def write_caption(folder: Path, name: str, was: list[str], texts: list[str]) -> None:
    """Change a picture's captions.

    was: what the page showed.

    Raises:
        RefusedError: they are others by now, or stand where they are not written.
    """
    if not texts or any(not text.strip() or len(text) > LONGEST or "\0" in text for text in texts):
        raise RefusedError("a caption is empty or too long; write one")
    texts = [text.strip() for text in texts]
    with _writing:
        shown: list[str] = next(
            (one["captions"] for one in list_pictures(folder)["pictures"] if one["name"] == name), []
        )
        if shown != was:
            raise RefusedError(f"the caption of {name} was changed meanwhile; what is there now is shown")
        changes = [_change(home, folder, name, texts) for home in _homes(folder, name)]
        for file, before, after in changes:
            _replace(file, before, after)
        _note([{"file": str(file), "before": before, "after": after} for file, before, after in changes], folder, name)


def _change(home: Path, folder: Path, name: str, texts: list[str]) -> tuple[Path, str | None, str]:
    """A file, the text in it (of a list: its piece) that goes, and what takes its place."""
    if is_list(home):
        own = PurePosixPath(name).relative_to(home.parent.relative_to(folder).as_posix()).as_posix()
        return home, *changed_piece(home, own, texts)
    if len(texts) > 1:
        raise RefusedError(f"{home.name} holds one caption; write one")
    return home, (read_whole(home) if home.is_file() else None), texts[0] + "\n"


def _replace(file: Path, before: str | None, after: str | None) -> None:
    """Put a text in the place of another one.

    Raises:
        RefusedError: that one is not there.
    """
    if is_list(file) and before is not None and after is not None:
        content = with_piece(file, before, after)
    elif (read_whole(file) if file.is_file() else None) != before:
        raise RefusedError(f"{file} was changed meanwhile; nothing was written")
    elif after is None:
        file.unlink()
        return
    else:
        content = after
    replace_file(file, lambda path: path.write_bytes(content.encode("utf-8")))


def _journal() -> Path:
    return runs_folder() / PRIVATE / "captions.jsonl"


def _note(changes: list[dict[str, Any]], folder: Path, name: str) -> None:
    _journal().parent.mkdir(parents=True, exist_ok=True)
    with _journal().open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"folder": str(folder), "name": name, "changes": changes}, ensure_ascii=False) + "\n")


def undoable(folder: Path) -> list[str]:
    """Names of the pictures whose changes in this folder can be undone, the latest last."""
    return [one["name"] for one in _noted() if one["folder"] == str(folder)]


def _noted() -> list[dict[str, Any]]:
    if not _journal().is_file():
        return []
    found = []
    for line in (
        _journal().read_text(encoding="utf-8", errors="replace").split("\n")
    ):  # a caption may hold other separators
        try:
            one = json.loads(line)
            found.append({"folder": one["folder"], "name": one["name"], "changes": one["changes"]})
        except (ValueError, KeyError, TypeError):  # torn
            continue
    return found


def undo(folder: Path) -> str:
    """Put back what the last change in a folder replaced; returns the picture's name.

    Raises:
        RefusedError: nothing was changed, or the file is another one by now.
    """
    with _writing:
        noted = _noted()
        last = next((i for i in range(len(noted) - 1, -1, -1) if noted[i]["folder"] == str(folder)), None)
        if last is None:
            raise RefusedError("no caption was changed here")
        for one in noted[last]["changes"]:
            file = Path(one["file"])
            if not file.resolve().is_relative_to(folder.resolve()):
                raise RefusedError(f"{file} lies outside of {folder}; nothing was written")
            _replace(file, one["after"], one["before"])
        name = str(noted.pop(last)["name"])
        content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in noted)
        replace_file(_journal(), lambda path: path.write_text(content, encoding="utf-8"))
        return name
