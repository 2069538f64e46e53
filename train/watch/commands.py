"""Forms of the page -> command lines, as words; each is checked as the command itself would check it.

A form names what a person decides. Whatever else is set is a line `name=value` of train.py's own settings, but for
those that run other programs, lead out of the folders that the page may use, or send something away.
"""

import json
import re
import shlex
import threading
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from infer.program.literal import kind_of, literal_arguments, quote, read_text_literally, required
from infer.program.paths import CONFIGS
from infer.program.run_names import check_run_name
from infer.program.secrets import check_values
from infer.program.settings import REFUSED, check_settings, explain, settings
from train.run.config import Train
from train.watch.places import RefusedError, data_folder

KINDS = {
    "thing": ("a thing", ["adapter.targets=attention+mlp"]),
    "person": ("a person or an animal", ["adapter.rank=32", "adapter.alpha=32", "adapter.targets=attention+mlp"]),
    "style": ("a style", ["adapter.targets=attention+mlp"]),
}
"""What is taught: its name, and the settings that differ from the defaults for it (docs/quick-start.md)."""
FORBIDDEN = (
    "hydra", "sweep", "track", "push", "mirror", "run", "resume", "device", "model", "data.path", "data.masks",
    "data.sources", "data.prior.path", "data.references", "edits",
    "data.cache", "adapter.start", "adapter.recovery", "encode", "sampling.model", "networks",
)  # fmt: skip
"""Settings that the form's further lines may not set, with all that is in them: they start programs, name paths or
send something away, or the form has a field for them."""
GROUPS = ("precision", "optim", "memory", "adapter", "sampling", "flow", "preserve")
"""Groups whose files may be chosen in those lines, as memory=lean."""
LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=.{0,2000}", re.DOTALL)
_composing = threading.Lock()


def text_of(form: dict[str, Any], name: str, most: int = 2000) -> str:
    """A field's text, stripped; empty if it is absent.

    Raises:
        RefusedError: it is no text, or too long.
    """
    value = form.get(name, "")
    if not isinstance(value, str) or len(value) > most or "\0" in value:
        raise RefusedError(f"{name} is no text of at most {most} letters")
    if "${" in value:
        raise RefusedError(f"{name} holds ${{, which would be filled in from elsewhere; leave it out")
    return value.strip()


def lines_of(form: dict[str, Any], name: str, most: int = 200) -> list[str]:
    """A field's lines, without empty ones."""
    lines = [line.strip() for line in text_of(form, name, 20_000).splitlines() if line.strip()]
    if len(lines) > most:
        raise RefusedError(f"{name} has {len(lines)} lines; give at most {most}")
    return lines


def models() -> list[str]:
    return sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))


def presets() -> list[str]:
    """Files of configs/experiment that are trainings."""
    found = []
    for file in sorted((CONFIGS / "experiment").glob("*.yaml")):
        if re.search(r"^(adapter|data|optim|steps|memory|accumulation):", file.read_text(), re.MULTILINE) and (
            "prompts:" not in file.read_text()
        ):
            found.append(file.stem)
    return found


def train_words(form: dict[str, Any], named: list[str]) -> list[str]:
    """The command that a form of a training means; named: data folders besides those in runs/.

    Raises:
        RefusedError: a field is wrong; the text says which and how to mend it.
    """
    words = ["train/train.py"]
    for field, name, known in (("preset", "experiment", presets()), ("model", "model", models())):
        value = text_of(form, field, 100)
        if value:
            if value not in known:
                raise RefusedError(f"{field} is {value!a}; choose one of {', '.join(known)}")
            words.append(f"{name}={value}")
    run = text_of(form, "run", 100)
    try:
        check_run_name(run)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    words.append(f"run={typed_text(run)}")
    folder = text_of(form, "data")
    if folder:
        data_folder(named, folder)
        words.append(f"data.path={typed_text(folder)}")
    kind = text_of(form, "kind", 100)
    if kind:
        if kind not in KINDS:
            raise RefusedError(f"kind is {kind!a}; choose one of {', '.join(KINDS)}")
        words += KINDS[kind][1]
    trigger = text_of(form, "trigger", 200)
    if trigger:
        words.append(f"data.trigger={typed_text(trigger)}")
    for field, name in (("resolution", "data.resolution"), ("steps", "steps")):
        value = text_of(form, field, 12)
        if value:
            if not value.isascii() or not value.isdecimal():
                raise RefusedError(f"{field} is {value!a}; give a whole number")
            words.append(f"{name}={value}")
    previews = lines_of(form, "previews", 20)
    if previews:
        words.append(f"previews={json.dumps(previews, ensure_ascii=False)}")
    words += [further(line) for line in lines_of(form, "more")]
    check(words, "train", Train)
    return words


def further(line: str) -> str:
    """A further setting of train.py, if the page may set it.

    Raises:
        RefusedError: it may not.
    """
    name, _, value = line.partition("=")
    if not LINE.fullmatch(line):
        raise RefusedError(f"{line[:80]!a} is no setting; write name=value, as in optim.lr=2e-4")
    if any(name == each or name.startswith(f"{each}.") for each in FORBIDDEN):
        raise RefusedError(f"{name} is not set from the page; copy the command and set it in a terminal")
    if name in GROUPS:
        options = sorted(file.stem for file in (CONFIGS / name).glob("*.yaml"))
        if value not in options:
            raise RefusedError(f"there is no {name}={value[:40]!a}; there are {', '.join(options)}")
    elif name not in set(settings(Train)) or is_dataclass(required(kind_of(Train, name))[0]):
        raise RefusedError(f"there is no setting {name!a} of train.py that can be set here")
    if value.startswith("@"):
        raise RefusedError(f"{name} reads a file; write its lines here")
    return line


def check(words: list[str], config: str, schema: Any) -> None:
    """See that a command's words compose and that every value is possible, as the command does first.

    Raises:
        RefusedError: they do not; the text is the command's own.
    """
    with _composing:
        GlobalHydra.instance().clear()
        try:
            arguments = literal_arguments(words[1:], schema)
            ConfigStore.instance().store(name=f"{config}_schema", node=schema)
            read_text_literally(lambda: schema)
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                composed = compose(config, arguments)
            check_settings(composed, schema)
            check_values(OmegaConf.to_object(composed))
        except REFUSED as error:
            raise RefusedError(explain(error, schema)) from error
        except RefusedError:
            raise
        except ValueError as error:
            raise RefusedError(str(error)) from error
        finally:
            GlobalHydra.instance().clear()


def typed(value: Any, kind: Callable[[Any], Any], name: str, low: float, high: float) -> Any:
    """A number of a form.

    Raises:
        RefusedError: it is none, or out of bounds.
    """
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise RefusedError(f"{name} is {str(value)[:40]!a}; give a number") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise RefusedError(f"{name} is {number}; give one from {low:g} to {high:g}")
    return number


def numbers(form: dict[str, Any], name: str, kind: Callable[[Any], Any], low: float, high: float) -> list[Any]:
    """A field of numbers with commas or blanks between them."""
    found = [typed(each, kind, name, low, high) for each in re.split(r"[,\s]+", text_of(form, name)) if each]
    if len(found) > 64:
        raise RefusedError(f"{name} has {len(found)} numbers; give at most 64")
    return list(dict.fromkeys(found))


def typed_text(value: str) -> str:
    """Text as the value of a text setting: commands take it as it is typed, but for null and what is quoted already."""
    return quote(value, always=True) if value.lower() == "null" or value[:1] in "'\"" else value


def shown(words: list[str]) -> str:
    """The command as it is typed in a shell."""
    return shlex.join(["python", *words])
