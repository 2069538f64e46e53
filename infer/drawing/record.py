"""What a picture was drawn with, as text in its PNG, and back as a command line."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infer.adapter.read import find_adapter
from infer.adapter.selection import Trained
from infer.drawing.settings import Draw, Planned
from infer.program.literal import kind_of, quote
from infer.program.paths import expanded
from infer.program.settings import settings

KEY = "flux_lora_draw"
LAYOUT = 1
TAKEN = (
    "model",
    "precision",
    "adapter",
    "sampling",
    "text_length",
    "prompt",
    "edits",
    "reference_resolution",
    "seeds",
)
"""What is read back; memory, device and out belong to the machine, not to the picture."""
LIBRARIES = ("torch", "diffusers", "transformers", "bitsandbytes", "peft")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def digests(*adapters: Trained) -> dict[str, str]:
    """SHA-256 of the adapters' files by their paths, as they were given."""
    paths = dict.fromkeys(one.path for adapter in adapters for one in adapter.all())
    return {path: file_digest(find_adapter(path)) for path in paths}


def paths_of(adapter: Trained) -> list[str]:
    """The paths of the adapters that are on."""
    return [] if adapter.path is None else [adapter.path, *(one.path for one in adapter.also)]


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record(options: Draw, one: Planned, digest: dict[str, str], size: tuple[int, int], facts: dict[str, Any]) -> str:
    """The text in a picture's PNG: JSON of its settings by dotted name, its adapters' digests, and `facts`.

    digest: of all adapters; size: height and width in pixels.
    """
    options = options.at(one.column)
    digest = {path: digest[path] for path in paths_of(options.adapter) if path in digest}
    values: dict[str, Any] = {"seeds": [one.seed], "text_length": options.text_length}
    if one.references:
        values["edits"] = [{"prompt": one.prompt, "references": [*one.references]}]
        values["reference_resolution"] = options.reference_resolution
    else:
        values["prompt"] = one.prompt
    for group in ("model", "precision", "adapter", "sampling"):
        values |= {f"{group}.{name}": value for name, value in asdict(getattr(options, group)).items()}
    values["sampling.height"], values["sampling.width"] = size
    shown = {"references": {path: file_digest(Path(path)) for path in one.references}} if one.references else {}
    said = {"layout": LAYOUT, "settings": values, "adapters": digest, **shown, **facts}
    return json.dumps(said, ensure_ascii=False)


def read_record(file: Path) -> dict[str, Any]:
    """What a PNG says of itself.

    Raises:
        ValueError: it cannot be read, or this command did not draw it.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            picture.load()
            said = getattr(picture, "text", {}).get(KEY)
        found = None if said is None else json.loads(said)
    except FileNotFoundError:
        raise ValueError(f"like: there is no file {str(file)!r}; give a PNG that infer/draw.py wrote") from None
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise ValueError(f"like: {file} cannot be read ({error}); give a PNG that infer/draw.py wrote") from error
    mend = "give a PNG that infer/draw.py wrote, unchanged: other programs leave its settings out"
    if found is None:
        raise ValueError(f"like: {file} says nothing of its settings; {mend}")
    if not (isinstance(found, dict) and isinstance(found.get("settings"), dict) and found.get("layout") == LAYOUT):
        raise ValueError(f"like: {file} says its settings in a form that is not known here; {mend}")
    known = {name for name in settings(Draw) if name.partition(".")[0] in TAKEN}
    if unknown := [name for name in found["settings"] if name not in known]:
        raise ValueError(f"like: {file} has {unknown[0]!r}, which is no setting of a picture; {mend}")
    return found


def like_arguments(arguments: list[str]) -> list[str]:
    """A command line in which like=FILE is replaced by the settings in that PNG, before all others, which win. A group
    that the command line chooses (`model=dev`), or another adapter or model by its path, takes the place of all that
    the PNG says of it.

    Raises:
        ValueError: the file says no settings, or its adapter's file is another one now.
    """
    asked = [argument for argument in arguments if argument.startswith("like=")]
    if not asked or asked[-1] == "like=null":
        return arguments
    others = [argument for argument in arguments if argument not in asked]
    file = Path(expanded(re.sub(r"^(['\"])(.*)\1$", r"\2", asked[-1].removeprefix("like="))))
    found = read_record(file)
    values: dict[str, Any] = found["settings"]
    given = {argument.partition("=")[0].lstrip("+") for argument in others}
    replaced = given & {name for name in TAKEN if is_dataclass(kind_of(Draw, name))}
    replaced |= {group for group in ("adapter", "model") if f"{group}.path" in given}
    replaced |= {group for group in ("adapter", "precision") if f"{group}s" in given}
    if given & {"prompt", "prompts", "edits"}:
        replaced |= {"prompt", "edits", "reference_resolution"}
    kept = {name: value for name, value in values.items() if name.partition(".")[0] not in replaced}
    kept = {name: value for name, value in kept.items() if name not in given}
    if "weights" in given:
        kept.pop("adapter.weight", None)
    if "edits" in kept:
        _check_references(file, found.get("references"))
    if "adapter.path" in kept and kept["adapter.path"] is not None:
        _check_adapters(file, found.get("adapters"))
    written = [_argument(name, value) for name, value in kept.items() if value != {}]
    return [*written, *others]


def _check_adapters(file: Path, digest: Any) -> None:
    for path, was in digest.items() if isinstance(digest, dict) else ():
        if digests(Trained(path)).get(path) != was:
            raise ValueError(
                f"like: {file} was drawn with another adapter than {path} is now; give adapter.path={path} to draw "
                "with what is there, or the path of the old one"
            )


def _check_references(file: Path, digest: Any) -> None:
    for path, was in digest.items() if isinstance(digest, dict) else ():
        if not Path(path).is_file() or file_digest(Path(path)) != was:
            raise ValueError(
                f"like: {file} was drawn with the reference {path}, which is not there as it was; put it back, or give "
                "edits=... anew"
            )


def _argument(name: str, value: Any) -> str:
    return f"{'++' if isinstance(value, dict) else ''}{name}={_typed(value)}"


def _typed(value: Any) -> str:
    """A value as Hydra reads it back; text in quotation marks, so that none of it is read as anything else."""
    if isinstance(value, dict):
        names = {key: re.sub(r"([\\()\[\]{}:=, ])", r"\\\1", key) for key in value}  # regular expressions, in layers
        return "{" + ",".join(f"{names[key]}:{_typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, str):
        # an interpolation's begin as text: with a backslash before it, and those that stand there already doubled
        return quote(re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value), True)
    return json.dumps(value)
