"""A command: its YAML composed by Hydra, turned into dataclasses once, and its errors said in one paragraph.

The exit codes are those of infer/program/errors.py; a config is checked before any model is loaded.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from infer.program.errors import explained, refuse
from infer.program.help import FLAGS, print_help
from infer.program.literal import literal_arguments, read_text_literally
from infer.program.paths import CONFIGS, SHIPPED
from infer.program.peers import PEERS
from infer.program.prompts import prompt_notes, read_prompt_files
from infer.program.run_names import check_run_name
from infer.program.secrets import check_values
from infer.program.settings import REFUSED, check_settings, explain, settings

T = TypeVar("T")

OmegaConf.register_new_resolver("root", lambda: str(SHIPPED), replace=True)
# Hydra copies the store of schemas whenever it composes, though what is loaded from it is a copy already
ConfigStore.__deepcopy__ = lambda store, copied: store


def run_command(name: str, schema: type[T], work: Callable[[T], Any]) -> None:
    """Compose `configs/<name>.yaml` with the command line, check it against `schema`, and do the work."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)
    def main(config: DictConfig) -> None:
        with explained(), _refused(schema):
            check_settings(config, schema)
            options: Any = OmegaConf.to_object(config)
            check_values(options)
        with explained(_folder(options)):
            work(options)

    with explained(), _refused(schema), _raising():
        _check_flags(sys.argv[1:], schema)
        sys.argv[1:] = read_prompt_files(sys.argv[1:], schema)
        notes = prompt_notes(sys.argv[1:], schema)
        sys.argv[1:] = literal_arguments(sys.argv[1:], schema, bool({"-m", "--multirun"} & set(sys.argv)))
        read_text_literally(lambda: schema)
        if set(FLAGS) & set(sys.argv):
            print_help(name, schema, sys.argv[1:])
            return
        for note in notes:
            print(note)
        main()


@contextmanager
def _refused(schema: Any) -> Iterator[None]:
    """Within, what Hydra and OmegaConf refuse is said in our words."""
    try:
        yield
    except REFUSED as error:
        refuse(explain(error, schema), error)


@contextmanager
def _raising() -> Iterator[None]:
    """Within, Hydra raises what it refuses; by itself it prints that and leaves."""
    name, before = "HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR")
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _check_flags(arguments: list[str], schema: Any) -> None:
    """Refuse --steps 5, which other programs take and Hydra answers with its own usage alone."""
    if nameless := [a for a in arguments if a.startswith("=")]:
        raise ValueError(f"the argument {nameless[0]!r} has no name; write name=value")
    unknown = [a for a in arguments if a.startswith("-") and a not in ("-", "--")]
    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for argument in unknown:
        flag, _, value = argument.partition("=")
        if flag not in known and not any(flag.startswith(short) for short in known if len(short) == 2):
            word = flag.lstrip("-").replace("-", "_")
            word, every = PEERS.get(word, word), list(settings(schema))
            if word not in every:  # a name within a group
                word = next((name for name in every if name.rpartition(".")[2] == word), word)
            after = arguments[arguments.index(argument) + 1 :][:1]
            value = value or next((one for one in after if not one.startswith("-") and "=" not in one), "...")
            raise ValueError(f"{argument!r} is no flag; settings are written without dashes, as {word}={value}")


def _folder(options: Any) -> Path | None:
    """The run's folder, if the command has one and its name is right."""
    try:
        return check_run_name(options.run) if hasattr(options, "run") else None
    except ValueError:
        return None
