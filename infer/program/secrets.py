"""Tokens and keys: they are in no config, no log and no file that is written here."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

NAMED = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)  # HF_TOKEN, WANDB_API_KEY, AWS_SECRET, ...
SHAPED = re.compile(r"hf_[A-Za-z0-9]{30,}|wandb_v1_[A-Za-z0-9_]{40,}|sk-[A-Za-z0-9_-]{32,}")
LEAST = 8  # characters: a shorter value is a word, such as "none"


def secrets() -> dict[str, str]:
    """The environment's tokens and keys, by name."""
    found = {name: value.strip() for name, value in os.environ.items() if NAMED.search(name)}
    return {name: value for name, value in found.items() if len(value) >= LEAST}


def hide(text: str) -> str:
    """The text with every token and key that is in it blotted out."""
    for name, value in sorted(secrets().items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{name}>")
    return SHAPED.sub("<a token>", text)


def check_values(options: Any) -> None:
    """See that no setting holds a token or key: settings are written into configs, adapters, reports and trackers. And
    none that JSON cannot hold: a number that is not finite, or text that is no Unicode.

    Raises:
        ValueError: one does; a token is named, and not shown.
    """
    for name, value in _leaves(options, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; give a finite number")
        if not isinstance(value, str):
            continue
        hidden = hide(value)
        if hidden != value:
            raise ValueError(
                f"{name} holds a token or key ({hidden}), and settings are written into files that you may share; take "
                "it out: HF_TOKEN and WANDB_API_KEY are read from the environment"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{name} is {value!a}, which is no UTF-8 text; write it in UTF-8, or rename the file")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every value that holds no others, by its dotted name."""
    if is_dataclass(value):
        for each in fields(value):
            yield from _leaves(getattr(value, each.name), f"{name}.{each.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(str(key), name)
            yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    else:
        yield name, value
