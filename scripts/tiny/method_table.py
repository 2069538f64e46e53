"""The rows of scripts/tiny/methods.py as tables of means over the seeds, with 95 % limits."""

from typing import Any

from infer.report.markdown import plain_table
from infer.score.bootstrap import interval

COMMON = {
    "subject_inked": "with the trigger: inked",
    "subject_right": "drawn right",
    "class_inked": "without: inked",
    "class_moved": "moved",
    "unrelated_inked": "others: inked",
    "unrelated_moved": "moved",
    "validation_loss": "validation loss",
}
COLUMNS = {
    "preservation": COMMON | {"seconds_per_step": "s a step"},
    "adapters": COMMON | {"seconds_per_step": "s a step"},
    "experiments": COMMON,
    "objectives": {"apart": "apart"} | COMMON,
}
"""By set: what of a row is shown, and its title."""


def table(rows: list[dict[str, Any]], name: str) -> str:
    """A line a variant of the set `name`; beside objectives the default too, which is `nothing` of preservation."""
    own = [row for row in rows if row["set"] == name]
    if name == "objectives":
        own = [row | {"apart": 0.0} for row in rows if row["variant"] == "nothing"] + own
    columns, lines = COLUMNS[name], []
    for variant, steps, trigger in dict.fromkeys((row["variant"], row["steps"], row["trigger"]) for row in own):
        found = [row for row in own if (row["variant"], row["steps"], row["trigger"]) == (variant, steps, trigger)]
        same = [row for row in own if row["variant"] == variant]
        apart = f", {steps} steps, {trigger}" if len(found) < len(same) else ""
        seeds = [(row["seed"], 0) for row in found]
        cells = [cell([row[column] for row in found], seeds, column) for column in columns]
        lines.append([f"{variant}{apart}", str(len(found)), *cells])
    return plain_table([["", "seeds", *columns.values()], *lines])


def cell(values: list[float], seeds: list[tuple[int, int]], column: str) -> str:
    """A mean, with its limits where these differ."""
    found, digits = interval(values, seeds), 3 if column == "validation_loss" else 2
    assert found is not None
    mean, low, high = (f"{0 if each is None else each:.{digits}f}" for each in (found.mean, found.low, found.high))
    return mean if found.low is None or low == high else f"{mean} ({low} to {high})"
