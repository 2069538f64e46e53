"""The settings of a command by name, and what Hydra refuses of them, said with the nearest one that there is."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    OmegaConfBaseException,
    ValidationError,
)

from infer.program.literal import TAKEN, kind_of
from infer.program.peers import PEERS

REFUSED = (HydraException, OmegaConfBaseException)
WANTED = {  # what OmegaConf says, and what it means
    "converted to Integer": "give a whole number",
    "converted to Float": "give a number",
    "is not a valid bool": "give true or false",
    "not Optional": "give a value, not null",
    "not a ListConfig": "give a list in brackets, as in [a,b]",
    "subclass of str": "give text",
    "Cannot assign": "give names and values, as in {name:value}",
    "subclass of": "name one of its options, or set what is in it one by one",
}


def settings(schema: Any, within: str = "") -> Iterator[str]:
    """Every setting's dotted name, groups before what is in them."""
    for name, kind in get_type_hints(schema).items():
        yield within + name
        if is_dataclass(kind):
            yield from settings(kind, f"{within}{name}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The setting or option that was meant: `; did you mean x?`, or nothing."""
    words = list(dict.fromkeys(known))
    group, _, word = name.rpartition(".")
    ends = {other.rpartition(".")[2]: other for other in reversed(words) if other.rpartition(".")[0] == group}
    same = [other for other in words if other.rpartition(".")[2] == word]
    close = get_close_matches(name, same, n=1, cutoff=0.8) or same[:3]
    # a part of a name, as batch of batch_size, is nearer than a word that is as long
    close = close or [ends[end] for end in ends if word in end.split("_") or (len(word) > 3 and end.startswith(word))]
    close = close[:3] or [ends[end] for end in get_close_matches(word, ends, n=1, cutoff=0.7)]
    close = close or [ends[end] for end in get_close_matches(word, ends, n=1) if len(end) == len(word)]
    if not close and group not in words:  # the group itself may be misspelt
        close = get_close_matches(name, words, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_settings(config: DictConfig, schema: Any) -> None:
    """See that a composed config has the schema's settings, all of them and no others.

    Raises:
        ValueError: one was added with + or taken away with ~, which OmegaConf would pass over in silence.
    """
    _check(config, schema, schema, "")


def _check(config: DictConfig, group: Any, schema: Any, within: str) -> None:
    kinds = get_type_hints(group)
    for name in map(str, config):
        if name not in kinds:
            raise ValueError(unknown(within + name, schema))
        if OmegaConf.is_missing(config, name):
            raise ValueError(f"{within}{name} has no value; write {within}{name}=...")
    if absent := kinds.keys() - set(config):
        raise ValueError(f"{within}{min(absent)} {TAKEN}")
    for name, kind in kinds.items():
        if is_dataclass(kind):
            _check(config[name], kind, schema, f"{within}{name}.")


def unknown(name: str, schema: Any) -> str:
    """The message for a setting that is not there."""
    every = [*settings(schema)]
    if (ours := PEERS.get(name.rpartition(".")[2])) in every:
        return f"there is no setting {name!r}; here it is called {ours}"
    group = name.rpartition(".")[0]
    beside = [other for other in every if group and other.rpartition(".")[0] == group]
    others = f"; choose one of {', '.join(beside)}" if beside else "; --help shows all with their values"
    return f"there is no setting {name!r}{nearest(name, every) or others}"


def explain(error: Exception, schema: Any) -> str:
    """What Hydra or OmegaConf refuses, as one paragraph with the mend."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException):
        return _missing(error, schema)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"the argument {error.override!r} has no name; write name=value, {_named(error.override, schema)}"
        return (
            f"the argument {error.override!r} cannot be read ({_first(error)}); write name=value, and put a value with "
            "spaces, commas, brackets or = in quotes within quotes, as in 'data.trigger=\"a, b\"'"
        )
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        name = str(cause.full_key)
        group = cause.object_type
        if is_dataclass(group) and name == cause.key and group is not schema:  # an entry of a list
            names = [each.name for each in fields(group)]
            return f"there is no {name!r} in a {group.__name__}{nearest(name, names) or '; it has ' + ', '.join(names)}"
        if is_dataclass(group):
            return unknown(name, schema)
        there = nearest(str(cause.key), map(str, cause.parent_node or {}))
        return f"there is no {name!r}{there or ';'} a new one is added with +{name}=..."
    if isinstance(cause, ValidationError) and cause.full_key:
        mend = next((mend for said, mend in WANTED.items() if said in str(cause)), "--help shows the defaults")
        value = "null" if cause.value is None else repr(cause.value)
        if cause.value is None and kind_of(schema, str(cause.full_key)) is str:
            mend += f", or for the word itself '{cause.full_key}=\"null\"'"
        return f"{cause.full_key} is {value} ({_first(cause).rstrip('.')}); {mend}"
    if isinstance(cause, ConfigTypeError) and "deletion" in str(cause):
        return f"{cause.full_key} {TAKEN}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key or 'the config'}: {_first(cause)}; mend that value"
    text = " ".join(str(error).split())
    if text.startswith("Ambiguous value"):
        given = text.split("'")[1]
        return f"{given!r} could be a list or text; write name=[a,b] for a list, or 'name=\"a,b\"' for text"
    if "Did you mean to override" in text or "No match in the defaults list" in text:
        name = text.partition("'")[2].partition("'")[0]
        if parts := [other for other in settings(schema) if other.startswith(f"{name}.")]:
            return f"{name} is set by its parts: {', '.join(f'{part}=...' for part in parts)}"
        return text.partition(" To append to your default list")[0].replace("Could not override", "there is no group")
    return text


def _named(word: str, schema: Any) -> str:
    """An example with the setting that a word without a name was meant for, as far as it tells."""
    every = [*settings(schema)]
    if not os.path.lexists(word) and "prompt" in every:
        return f"as in 'prompt=\"{word}\"'"
    path = next((name for name in ("data.path", "adapter.path", "model.path") if name in every), None)
    return f"as in {path}={word if os.path.lexists(word) else '...'}" if path else "as --help shows them"


def _missing(error: MissingConfigException, schema: Any) -> str:
    if not error.options:
        return f"{_first(error)} Leave --config-name and --config-path out: the settings are in configs/"
    # the group is the first part: what was given may be a path
    group, _, option = str(error.missing_cfg_file).partition("/")
    near = nearest(option, error.options) or nearest(Path(option).stem, error.options)
    said = f"there is no {group}={option}{near or ';'} there are {', '.join(error.options)}"
    paths = [name for name in settings(schema) if name in (f"{group}.path", f"{group}.start")]
    if paths and ("/" in option or "." in option or os.path.lexists(option)):
        said += f"; a path or name of the Hub is given as {' or as '.join(f'{name}={option}' for name in paths)}"
    return said


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()
