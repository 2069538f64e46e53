"""A comparison's curves for its page: memory and time by precision, memory by stage, and each score by precision."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from infer.report.cells import variant_text
from infer.report.means import by_memory, by_variant, score_names, score_of
from infer.report.plot import Lines, series
from infer.report.results import Estimate, Row, Summary

STAGES = ("load", "encode", "denoise", "decode")


def cost_plots(rows: Sequence[Row], peak: str) -> list[Lines]:
    """Memory by precision and by stage, time by precision; `peak` says what peak memory means."""
    names = by_memory(rows)
    of_precision = {name: [row for row in rows if row.precision == name] for name in names}
    of_variant = by_variant(rows)
    unit, unit_name = (2**30, "GiB") if max(row.peak_memory_bytes for row in rows) >= 2**30 else (2**20, "MiB")

    def most(counts: Iterable[int]) -> Estimate:
        return Estimate(max(counts) / unit)

    memory = [
        (peak, [most(row.peak_memory_bytes for row in of_precision[name]) for name in names]),
        ("weights", [most(row.weights_bytes for row in of_precision[name]) for name in names]),
    ]
    plots = [Lines(f"Memory, {unit_name}", names, series(memory), zero=True)]
    stages = [stage for stage in STAGES if all(stage in row.stages for row in rows)]
    if len(stages) > 1:
        by_stage = [
            (name, [most(row.stages[stage].peak_memory_bytes for row in of_precision[name]) for stage in stages])
            for name in names
        ]
        plots.append(Lines(f"{peak.capitalize()} by stage, {unit_name}", stages, series(by_stage), zero=True))
    seconds = [
        (
            variant_text(adapter),
            [
                Estimate(fmean(row.seconds for row in of_variant[name, adapter]))
                if (name, adapter) in of_variant
                else None
                for name in names
            ],
        )
        for adapter in dict.fromkeys(row.adapter for row in rows)
    ]
    return [*plots, Lines("Seconds a picture", names, series(seconds), zero=True)]


def score_plots(rows: Sequence[Row], summary: Sequence[Summary]) -> list[Lines]:
    """For each score its mean at each precision, a line for each adapter."""
    names = by_memory(rows)
    entries = {entry.variant: entry for entry in summary}
    adapters = list(dict.fromkeys(adapter for _, adapter in entries))

    def values(score: str, adapter: str | None) -> list[Estimate | None]:
        return [score_of(entry, score) if (entry := entries.get((name, adapter))) else None for name in names]

    return [
        Lines(score, names, series([(variant_text(adapter), values(score, adapter)) for adapter in adapters]))
        for score in score_names(summary)
    ]
