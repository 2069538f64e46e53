"""What train/look.py found in a folder of pictures: duplicates, broken ones, buckets, and each crop as it is trained.

The page starts it as a job and reads runs/look/<folder>/data.json; the crops are cut from the pictures when they are
looked at.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from infer.sample.picture import SUFFIXES, decode
from train.data.view import View, scaled
from train.run.config import Train
from train.survey.record import LAYOUT, NAME
from train.watch.commands import check, models, text_of, typed, typed_text
from train.watch.places import RefusedError, data_folder, runs_folder, within
from train.watch.states import read_json

MOST = 2**28  # bytes of a survey
SIDE = 384  # pixels of a shown crop's longest side


def survey_name(folder: str) -> str:
    """The run that a folder's survey is kept under."""
    word = re.sub(r"[^A-Za-z0-9-]+", "-", Path(folder).name).strip("-")[:40] or "pictures"
    return f"look/{word}-{hashlib.sha256(folder.encode()).hexdigest()[:6]}"


def survey_words(form: dict[str, Any], named: list[str]) -> list[str]:
    """train/look.py over a data folder.

    Raises:
        RefusedError: a field is wrong.
    """
    folder = text_of(form, "folder")
    data_folder(named, folder)
    words = ["train/look.py"]
    model = text_of(form, "model", 100)
    if model:
        if model not in models():
            raise RefusedError(f"model is {model!a}; choose one of {', '.join(models())}")
        words.append(f"model={model}")
    words += [f"data.path={typed_text(folder)}", f"run={survey_name(folder)}"]
    for field, high in (("resolution", 8192), ("crops", 64)):
        value = text_of(form, field, 12)
        if value:
            words.append(f"data.{field}={typed(value, int, field, 1, high)}")
    if text_of(form, "flip", 4):
        words.append("data.flip=true")
    trigger = text_of(form, "trigger", 200)
    if trigger:
        words.append(f"data.trigger={typed_text(trigger)}")
    check(words, "train", Train)  # whose settings of data these are
    return words


def read_survey(folder: str) -> dict[str, Any] | None:
    """What was found in a data folder, with names in it; None if nobody has looked, or another version did."""
    said = read_json(runs_folder() / survey_name(folder) / NAME, MOST)
    if said.get("layout") != LAYOUT or said.get("data") != [folder]:
        return None

    def short(name: str) -> str:
        return name.removeprefix(f"{folder.rstrip('/')}/")

    for kind in ("pictures", "skipped"):
        said[kind] = [one | {"name": short(one["name"])} for one in said[kind]]
    for one in said["pictures"]:
        one["notes"] = [note.replace(f"{folder.rstrip('/')}/", "") for note in one["notes"]]
    for one in said["skipped"]:
        one["picture"] = Path(one["name"]).suffix.lower() in SUFFIXES
    for kind in ("copies", "near"):
        said[kind] = [[short(name) for name in group] for group in said[kind]]
    return said


def crop(folder: Path, name: str, view: dict[str, Any]) -> Image.Image:
    """A picture's view as it is trained, made small. view: height, width, box and flip.

    Raises:
        RefusedError: there is no such picture, or the view is none of it.
        ValueError: the picture cannot be read.
    """
    file = within(folder, name)
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        raise RefusedError(f"there is no picture {name!a}")
    picture = decode(file.read_bytes(), file.name)
    left, top, right, bottom = view["box"]
    share = min(1.0, SIDE / max(view["width"], view["height"]))
    width, height = (max(1, round(view[side] * share)) for side in ("width", "height"))
    if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
        raise RefusedError(f"{name!a} has another size now; look at the pictures again")
    shown = scaled(picture, View(height, width, (left, top, right, bottom), view["flip"]))
    return ImageOps.mirror(shown) if view["flip"] else shown


def view_of(text: str) -> dict[str, Any]:
    """A view as an address says it: width,height,left,top,right,bottom,flip.

    Raises:
        RefusedError: it is none.
    """
    parts = text.split(",")
    if len(parts) != 7 or parts[6] not in ("0", "1"):
        raise RefusedError(f"{text[:40]!a} is no view")
    width, height = (typed(part, int, "view", 16, 8192) for part in parts[:2])
    box = [typed(part, float, "view", 0, 10**6) for part in parts[2:6]]
    return {"width": width, "height": height, "box": box, "flip": parts[6] == "1"}
