"""The figure of a gap: by noise level, how far velocities are from the first precision's, and what that costs."""

from collections.abc import Sequence
from pathlib import Path

from infer.report.plot import Lines, Series
from infer.report.png import save_lines
from infer.report.results import Estimate
from train.probe.gap_summary import GapSummary


def draw_curves(summary: Sequence[GapSummary], path: Path) -> None:
    """A PNG with two panels; solid without, dashed with the adapter; bars are the 95 % limits."""
    first = summary[0].precision
    names = list(dict.fromkeys(entry.precision for entry in summary if entry.precision != first))
    adapters = list(dict.fromkeys(entry.adapter for entry in summary))
    levels = {entry.level: entry.sigma for entry in summary if entry.level is not None and entry.sigma is not None}
    errors, costs = [], []
    for colour, name in enumerate(names):
        for adapter in adapters:
            label = name if adapter is None else f"{name} + {adapter}"
            at = {entry.level: entry for entry in summary if (entry.precision, entry.adapter) == (name, adapter)}
            percent = [_scaled(at[level].error, 100) for level in levels]
            errors.append(Series(label, percent, colour, dashed=adapter is not None))
            costs.append(Series(label, [at[level].cost for level in levels], colour, dashed=adapter is not None))
    sigmas = list(levels.values())
    plots = [
        Lines(f"velocity: error relative to {first}, %", sigmas, errors),
        Lines(f"loss above {first}'s, same picture and noise", sigmas, costs),
    ]
    save_lines(path, plots, "noise level (0: the picture, 1: noise)", log={0})


def _scaled(e: Estimate, factor: float) -> Estimate:
    return Estimate(*(None if value is None else factor * value for value in e[:3]))  # type: ignore[arg-type]
