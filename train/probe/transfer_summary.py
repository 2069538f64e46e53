"""What a transfer measured: rows, their means over training seeds with limits, and the tables of these."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from infer.report.results import Estimate


@dataclass(frozen=True)
class TransferRow:
    """One adapter at one precision."""

    trained: str
    """The precision that it was trained at."""
    run: str
    """The precision that it was run at."""
    seed: int
    """Of its training."""
    figures: dict[str, float]
    """`loss`, the objective on what its training held out, and the means of the scores over prompts."""

    def to_json(self) -> dict[str, Any]:
        return {"trained": self.trained, "run": self.run, "seed": self.seed, **self.figures}


@dataclass(frozen=True)
class TransferSummary:
    """One figure of the adapters that were trained at one precision and run at one."""

    trained: str
    run: str
    figure: str
    mean: Estimate
    """Over seeds."""
    cost: Estimate
    """How much more it is than with the adapter that was trained at the precision it runs at, paired by seed."""


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with Student's 95 % limits: a bootstrap of five values would be too narrow."""
    from scipy.stats import t

    mean = fmean(values)
    if len(set(values)) == 1:
        return Estimate(mean, mean, mean, len(values))
    margin = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - margin, mean + margin, len(values))


def summarise(rows: Sequence[TransferRow]) -> list[TransferSummary]:
    """One summary for each (trained, run, figure)."""
    figures = {(row.trained, row.run, row.seed): row.figures for row in rows}
    seeds = list(dict.fromkeys(row.seed for row in rows))
    found = []
    for trained, run in dict.fromkeys((row.trained, row.run) for row in rows):
        for figure in rows[0].figures:
            values = [figures[trained, run, seed][figure] for seed in seeds]
            matched = [figures[run, run, seed][figure] for seed in seeds]
            costs = [value - other for value, other in zip(values, matched, strict=True)]
            found.append(TransferSummary(trained, run, figure, over_seeds(values), over_seeds(costs)))
    return found


def table(summary: Sequence[TransferSummary], figure: str, key: str) -> list[list[str]]:
    """Titles and cells of one figure: a line for each precision of training, a column for each precision of running.

    key: mean or cost.
    """
    chosen = [entry for entry in summary if entry.figure == figure]
    runs = list(dict.fromkeys(entry.run for entry in chosen))
    trained = list(dict.fromkeys(entry.trained for entry in chosen))
    sign = "+" if key == "cost" else ""
    cells = {(entry.trained, entry.run): _text(getattr(entry, key), sign) for entry in chosen}
    return [["trained at", *(f"run at {run}" for run in runs)], *([t, *(cells[t, r] for r in runs)] for t in trained)]


def _text(found: Estimate, sign: str) -> str:
    return f"{found.mean:{sign}.4f} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"
