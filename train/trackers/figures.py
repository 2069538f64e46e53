"""The figures of a finished run, read from what it and its comparison have written."""

import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

from infer.report.means import mean_scores
from infer.report.results import read_results
from train.trackers.metrics import read_events


def read_figures(folder: Path, compared: bool) -> dict[str, float]:
    """What a run cost and gave.

    `validation_loss` at the end, `loss` (mean of the last tenth of the steps), `seconds` of all steps,
    `seconds_per_step` (median), `memory_gib` (peak of the training); with a comparison the means over the pictures with
    the adapter: each score by its name, `image_seconds`, and `image_memory_gib` (peak).
    """
    events = read_events(folder / "metrics.jsonl")
    steps = [event for event in events if "seconds" in event]
    losses = [event["loss"] for event in steps if "loss" in event]  # an update that was left out has none
    figures: dict[str, float] = {}
    if losses:
        figures["loss"] = fmean(losses[-max(1, len(losses) // 10) :])
    if steps:
        figures["seconds"] = sum(event["seconds"] for event in steps)
        figures["seconds_per_step"] = median(event["seconds"] for event in steps)
        figures["memory_gib"] = max(event["memory_gib"] for event in steps)
    validated = [event["validation_loss"] for event in events if "validation_loss" in event]
    if validated:
        figures["validation_loss"] = validated[-1]
    results = folder / "compare" / "results.json"
    if compared and results.is_file():
        rows = [row for row in read_results(results).rows if row.adapter is not None]
        figures["image_seconds"] = fmean(row.seconds for row in rows)
        figures["image_memory_gib"] = max(row.peak_memory_bytes for row in rows) / 2**30
        figures |= {name: mean for name, mean in mean_scores(rows).items() if mean is not None}
    return figures


def objectives_of(figures: dict[str, float], objectives: dict[str, Any]) -> tuple[float, ...]:
    """The figures that count, in order.

    Raises:
        ValueError: a figure is absent or no number.
    """
    for name in objectives:
        if not math.isfinite(figures.get(name, math.nan)):
            raise ValueError(
                f"sweep.objectives names {name}, which this point has not; it has {', '.join(figures) or 'none'}"
            )
    return tuple(figures[name] for name in objectives)
