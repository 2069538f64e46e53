"""What `--help` prints: what a command does, the groups of its settings, and a line for each setting.

The text of a setting is that below its field; docs/settings.md holds all of it, this only the first sentence.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from infer.program.docstrings import field_docs
from infer.program.paths import CONFIGS

WIDEST = 34  # letters of a setting with its value; longer ones push their text to the right
FLAGS = ("--help", "-h")


@dataclass
class Group:
    """A dataclass among a command's settings, or the command's own."""

    name: str
    """Dotted; empty for the command's own settings."""
    kind: Any
    options: list[str]
    """The files that fill it, as in model=dev."""
    settings: list[str]
    """Its fields that are no groups themselves."""


def groups_of(schema: Any, within: str = "") -> Iterator[Group]:
    """The command's own settings, then its groups, each before those within it."""
    hints = get_type_hints(schema)
    folder = CONFIGS / within.replace(".", "/")
    options = sorted(file.stem for file in folder.glob("*.yaml")) if within else []
    yield Group(within, schema, options, [name for name, kind in hints.items() if not is_dataclass(kind)])
    for name, kind in hints.items():
        if is_dataclass(kind):
            yield from groups_of(kind, f"{within}.{name}".lstrip("."))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, in one line."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(text.split()))[0]


def shown(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, dict) and any(isinstance(each, dict) for each in value.values()):
        return "{" + ",".join(value) + "}"
    if value == "":
        return "''"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def help_text(command: str, schema: Any, values: dict[str, Any], about: str, width: int | None) -> str:
    """The whole text.

    Args:
        command: how it is called.
        values: the composed settings in plain containers, groups nested.
        about: the command's docstring.
        width: columns that a line may have, or None for any number.
    """
    lines = [f"usage: {command} name=value ...", "", about.strip(), ""]
    lines += ["Behind each = stands what is used if you say nothing else. docs/settings.md says more of each setting."]
    if "experiment" not in get_type_hints(schema):
        used = [file.stem for file in sorted((CONFIGS / "experiment").glob("*.yaml"))]
        lines += ["", f"  experiment={'|'.join(used)}", "      settings that belong together, such as those of a card"]
    for group in groups_of(schema):
        inner: Any = values
        for part in filter(None, group.name.split(".")):
            inner = inner[part]
        if group.name:
            choice = f" ({group.name}={'|'.join(group.options)})" if group.options else ""
            lines += ["", f"{group.name}{choice}: {first_sentence(group.kind.__doc__)}"]
        else:
            lines += [""]
        docs = field_docs(group.kind)
        for name in group.settings:
            value = shown(inner[name])
            value = value if len(value) <= WIDEST else f"{value[: WIDEST - 1]}…"
            setting = f"{group.name}.{name}={value}".lstrip(".")
            lines.append(f"  {setting:{WIDEST}}  {first_sentence(docs[name])}")
    return "\n".join(line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def print_help(name: str, schema: Any, arguments: list[str]) -> None:
    """Print a command's help, with the settings of its arguments; a reader that stops early, as head, is no error."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    given = get_args_parser().parse_args([each for each in arguments if each not in FLAGS])
    search = [f"hydra.searchpath=[{Path(given.config_dir).resolve()}]"] if given.config_dir else []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(name, [*given.overrides, *search]), resolve=True)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        main = sys.modules["__main__"]
        called = os.path.relpath(sys.argv[0]) if main.__spec__ is None else f"-m {main.__spec__.name}"
        print(help_text(f"python {called}", schema, values, main.__doc__ or "", width), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
