"""Settings that have no effect beside others: refused, so that nobody believes that they act."""

from dataclasses import MISSING, fields
from typing import Any


def changed(options: Any, *names: str) -> list[str]:
    """Those of a dataclass's fields whose values are not their defaults."""
    found = []
    for each in fields(options):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if each.name in names and getattr(options, each.name) != default:
            found.append(each.name)
    return found


def refuse_idle(options: Any, group: str, names: tuple[str, ...], reason: str) -> None:
    """Refuse fields whose values are not their defaults, because `reason`. A default passes: nobody chose it.

    group: their dotted prefix, with its dot.

    Raises:
        ValueError: there is such a field; the message names it, its value, the reason and its default.
    """
    found = changed(options, *names)
    if found:
        default = next(each for each in fields(options) if each.name == found[0])
        plain = default.default_factory() if default.default_factory is not MISSING else default.default
        raise ValueError(
            f"{group}{found[0]} is {_spelt(getattr(options, found[0]))}, which has no effect: {reason}; leave it at "
            f"{_spelt(plain)}"
        )


def _spelt(value: Any) -> str:
    """As it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
