"""What was typed for a text setting is what is used: `data.trigger=1e3` is no number, `run=läufe` no error.

Hydra reads a value by its own grammar before anybody knows the setting's type: 1e3 becomes 1000.0, 2024_08_20 becomes
20240820, and a letter beyond ASCII is refused. So the type is looked up in the command's schema first, and what a text
setting is given is put in quotation marks; `null` stays what it is, `${...}` is still filled in, and a value that is in
quotation marks already is left alone. Text in a YAML file is read as it stands there, quoted or not.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import is_dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig
from omegaconf._utils import get_yaml_loader

from infer.program.paths import CONFIGS

TAKEN = "is taken away, but every setting has a value; leave the ~ out"
WORDS = ("null", "true", "false", "nan", "inf")  # which are no strings on Hydra's command line
PLAIN = re.compile(r"[A-Za-z/_][\w./-]*", re.ASCII)  # what Hydra reads as text without quotation marks
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
SWEPT = re.compile(r"(choice|shuffle|sort)\((.*)\)", re.DOTALL)  # of several values, each of the setting's type
FUNCTION = re.compile(r"(range|interval|glob|tag|extend_list)\(.*\)", re.DOTALL)
OPENS, CLOSES = "([{", ")]}"


def is_plain(text: str) -> bool:
    """Whether Hydra reads it as this text without quotation marks."""
    return PLAIN.fullmatch(text) is not None and text.lower() not in WORDS


def quote(text: str, always: bool = False) -> str:
    """Text in quotation marks of Hydra's, where it needs them or `always`; `${` stays the begin of an interpolation."""
    if is_plain(text) and not always:
        return text
    # a backslash is doubled only where it stands before a quotation mark
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def required(kind: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if get_origin(kind) in (Union, UnionType):
        others = [each for each in get_args(kind) if each is not type(None)]
        return (others[0] if len(others) == 1 else Any), len(others) < len(get_args(kind))
    return kind, False


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # which reads each annotation anew


def _within(kind: Any, name: str) -> Any:
    """The type of what a group, dictionary or list holds by a name; None if there is none."""
    kind, _ = required(kind)
    if is_dataclass(kind):
        return _hints(kind).get(name)
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return get_args(kind)[0] if get_origin(kind) is list and name.isdecimal() else None


def kind_of(schema: Any, name: str) -> Any:
    """The type of a setting by its dotted name; None if the schema has none of that name."""
    kind = schema
    for part in name.split("."):
        kind = _within(kind, part)
    return kind


def split(text: str, by: str = ",") -> list[str] | None:
    """The parts between separators that stand in no brackets and no quotation marks; None if brackets do not match."""
    for opens, closes in ((OPENS, CLOSES), (OPENS[1:], CLOSES[1:])):  # a ( alone may be of the text, as in :(
        parts, stack, position, fresh = [""], "", 0, True
        while position < len(text):
            letter = text[position]
            within = QUOTED.match(text, position) if fresh and letter in "'\"" else None
            word = within[0] if within else letter
            position += len(word)
            if word == by and not stack:
                parts.append("")
            else:
                parts[-1] += word
            if word in opens:
                stack += closes[opens.index(word)]
            elif word in closes:
                if stack[-1:] != word:
                    break
                stack = stack[:-1]
            fresh = word in (*OPENS, ",", ":") or (fresh and word.isspace())
        else:
            if not stack:
                return parts
    return None


def inside(text: str, brackets: str) -> list[str] | None:
    """What stands between a pair of brackets and commas; None where Hydra has to say what is wrong."""
    text = text.strip()
    if text[:1] != brackets[0] or text[-1:] != brackets[1] or "\\," in text:
        return None
    parts = split(text[1:-1])
    if parts is None or not all(part.strip() for part in parts[1:]):
        return None
    return [] if parts == [""] else [part.strip() for part in parts]


def literal(text: str, kind: Any, element: bool = False) -> str:
    """A value, quoted where Hydra would otherwise not read back what was typed. element: of a list or dictionary."""
    kind, optional = required(kind)
    if kind is str:
        # what no null may be says so itself, and how to write the word
        is_null = text.strip().lower() == "null" and (optional or not element)
        return text if is_null or QUOTED.fullmatch(text.strip()) else quote(text)
    if get_origin(kind) is list and (parts := inside(text, "[]")) is not None:
        return f"[{','.join(literal(part, get_args(kind)[0], True) for part in parts)}]"
    if (get_origin(kind) is dict or is_dataclass(kind)) and (parts := inside(text, "{}")) is not None:
        pairs = [part.partition(":") for part in parts]
        return "{" + ",".join(f"{k}:{literal(v.strip(), _within(kind, k.strip()), True)}" for k, _, v in pairs) + "}"
    if is_dataclass(kind):
        return _option(text, True)
    return text if text.isascii() or text[:1] in "[{'\"" else quote(text)


def _option(text: str, null: bool) -> str:
    """The name of a group's option; null: whether that has to be an option too."""
    if text[:1] in ("[", "{", "'", '"') or "$" in text or (text.isascii() and "," in text):
        return text
    return text if text.lower() == "null" and not null else quote(text)


def literals(text: str, kind: Any) -> str:
    """A value of a sweep, which may be several values with commas between them."""
    if several := SWEPT.fullmatch(text):
        parts = split(several[2])
        return text if parts is None else f"{several[1]}({','.join(literal(p.strip(), kind, True) for p in parts)})"
    if FUNCTION.fullmatch(text) or "\\," in text:
        return text
    parts = split(text)
    if parts is None or len(parts) == 1:
        return literal(text, kind)
    return ",".join(literal(part.strip(), kind) for part in parts)


def literal_arguments(arguments: list[str], schema: Any, sweep: bool = False) -> list[str]:
    """A command line whose text settings Hydra reads as they were typed. sweep: whether a comma parts values.

    Raises:
        ValueError: a setting is taken away with ~, which Hydra would take in silence.
    """
    return [_argument(argument, schema, sweep) for argument in arguments]


def _argument(argument: str, schema: Any, sweep: bool) -> str:
    if argument.startswith("~"):
        name = argument[1:].partition("=")[0]
        parent = kind_of(schema, name.rpartition(".")[0]) if "." in name else schema
        if kind_of(schema, name) is not None and get_origin(required(parent)[0]) is not dict:
            raise ValueError(f"{name} {TAKEN}")
        return argument
    name, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    if re.search(r"\d{1000}", value) and kind_of(schema, name.lstrip("+")) is not str:
        raise ValueError(f"{name.lstrip('+')} has a number of more than a thousand digits; give a smaller one")
    name, value = _entry(name, value, schema)
    known = kind_of(schema, name.lstrip("+"))
    if known is not None:
        return f"{name}={(literals if sweep else literal)(value, known)}"
    group = name.lstrip("+").partition("@")[0]
    if "." in group or not (CONFIGS / group).is_dir():
        return f"{name}={value if sweep else literal(value, Any)}"
    options = (split(value) if sweep else None) or [value]
    return f"{name}={','.join(_option(option, '@' in name) for option in options)}"


def _entry(name: str, value: str, schema: Any) -> tuple[str, str]:
    """New entries of a dictionary, whose names may have dots: Hydra takes them in braces, and with a +."""
    parts = name.lstrip("+").split(".")
    for count in range(1, len(parts) + 1):
        group, entry = ".".join(parts[:count]), ".".join(parts[count:])
        kind = required(kind_of(schema, group))[0]
        if get_origin(kind) is dict and get_args(kind)[1] is str:
            if "." in entry:
                return f"++{group}", f"{{{entry}:{literal(value, str, True)}}}"
            return (f"++{group}", value) if not entry and value[:1] == "{" else (name, value)
    return name, value


class TextFiles(FileConfigSource):
    """YAML files whose text settings are read as they stand there."""

    schema: Callable[[], Any]

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        if not file.is_file():
            return super().load_config(config_path)  # which says so
        found = _read(type(self).schema(), self.provider, self.path, config_path, file.read_text(encoding="utf-8"))
        return replace(found, config=deepcopy(found.config), header=dict(found.header))  # Hydra changes both


@lru_cache(maxsize=500)
def _read(schema: Any, provider: str, path: str, config_path: str, text: str) -> ConfigResult:
    """One file, parsed once a process: Hydra composes twice, first to see whether one run is meant or several."""
    found = FileConfigSource(provider, path).load_config(config_path)
    group = config_path.rpartition("/")[0]
    package = found.header.get("package") or group.replace("/", ".")
    kind = schema if package in ("_global_", "") else kind_of(schema, package)
    tree = yaml.compose(text, Loader=get_yaml_loader())
    if kind is not None and isinstance(tree, yaml.MappingNode):
        _restore(found.config, tree, kind)
        if kind is schema:
            _restore_sweep(found.config, schema)
    return found


def _restore(config: Any, node: yaml.Node, kind: Any) -> None:
    """Put the text of a file's scalars where the schema wants text and YAML has read something else."""
    kind, _ = required(kind)
    inner: list[tuple[Any, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode) and isinstance(config, DictConfig):
        inner = [(name.value, value) for name, value in node.value if name.value in config]
    elif isinstance(node, yaml.SequenceNode) and isinstance(config, ListConfig):
        inner = list(enumerate(node.value))
    for name, value in inner:
        wanted, may_be_null = required(_within(kind, str(name)))
        if wanted is str and isinstance(value, yaml.ScalarNode):
            element = get_origin(kind) in (list, dict) and not may_be_null
            if not value.tag.endswith((":str", ":null")) or (element and value.tag.endswith(":null")):
                config[name] = value.value
        elif wanted is not None:
            _restore(config._get_node(name), value, wanted)


def _restore_sweep(config: DictConfig | ListConfig, schema: Any) -> None:
    """The same for the values of a sweep that is written in a file."""
    params: Any = config
    for name in ("hydra", "sweeper", "params"):
        params = params.get(name) if isinstance(params, DictConfig) else None
    for key in params if isinstance(params, DictConfig) else ():
        known = kind_of(schema, str(key).lstrip("+"))
        value = params._get_node(key)._value()
        if known is not None and isinstance(value, str):
            params[key] = literals(value, known)


def read_text_literally(schema: Callable[[], Any]) -> None:
    """From here on, Hydra reads text settings of YAML files as they stand there; each file asks for the schema."""
    Plugins.instance()  # registers its own kinds of sources, and takes no others of their name
    # under the name of Hydra's own: a launcher's process is given this registry and registers Hydra's kinds again, and
    # Hydra refuses a second kind of another name
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = type(
        FileConfigSource.__name__, (TextFiles,), {"schema": staticmethod(schema)}
    )
