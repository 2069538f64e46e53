"""A comparison's curves for its page: memory and time by precision, memory by stage, and each score by precision."""

from statistics import fmean
from typing import Any

from infer.report.cells import Estimate, Row, by_memory, score_names, score_of, variant
from infer.report.chart import Line, chart

STAGES = ("load", "encode", "denoise", "decode")


def cost_charts(rows: list[Row], peak: str) -> list[str]:
    """Memory by precision and by stage, time by precision."""
    names, adapters = by_memory(rows), list(dict.fromkeys(row["adapter"] for row in rows))
    most = max(row["peak_memory_bytes"] for row in rows)
    unit, name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")

    def of(precision: str, adapter: Any = ...) -> list[Row]:
        return [r for r in rows if r["precision"] == precision and (adapter is ... or r["adapter"] == adapter)]

    def line(title: str, key: str) -> Line:
        return title, [Estimate(max(row[key] for row in of(precision)) / unit) for precision in names]

    stages = [stage for stage in STAGES if all(stage in row["stages"] for row in rows)]
    by_stage: list[Line] = [
        (
            precision,
            [
                Estimate(max(row["stages"][stage]["peak_memory_bytes"] for row in of(precision)) / unit)
                for stage in stages
            ],
        )
        for precision in names
    ]
    seconds: list[Line] = [
        (
            variant(adapter),
            [Estimate(fmean(r["seconds"] for r in found)) if (found := of(p, adapter)) else None for p in names],
        )
        for adapter in adapters
    ]
    charts = [
        chart(f"Memory, {name}", names, [line(peak, "peak_memory_bytes"), line("weights", "weights_bytes")], zero=True)
    ]
    if len(stages) > 1:
        charts.append(chart(f"{peak.capitalize()} by stage, {name}", stages, by_stage, zero=True))
    return [*charts, chart("Seconds a picture", names, seconds, zero=True)]


def score_charts(rows: list[Row], summary: list[Row]) -> list[str]:
    """A chart a score: its mean at each precision, a line an adapter."""
    names = by_memory(rows)
    entries = {(entry["precision"], entry["adapter"]): entry for entry in summary}
    adapters = list(dict.fromkeys(adapter for _, adapter in entries))

    def values(score: str, adapter: str | None) -> list[Estimate | None]:
        return [score_of(entry, score) if (entry := entries.get((name, adapter))) else None for name in names]

    return [
        chart(score, names, [(variant(adapter), values(score, adapter)) for adapter in adapters])
        for score in score_names(summary)
    ]
