"""Means over the pictures of a comparison, and the order in which its precisions are shown."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from infer.report.results import Comparison, Estimate, Row, Scores, Summary, Variant


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary for each (precision, adapter), in order of first appearance: means over its pictures, highest bytes.

    A score's mean is over the pictures where it is defined, and None where it is defined for none.
    """
    return [
        Summary(
            precision=precision,
            adapter=adapter,
            images=len(group),
            weights_bytes=max(row.weights_bytes for row in group),
            peak_memory_bytes=max(row.peak_memory_bytes for row in group),
            load_seconds=fmean(row.stages["load"].seconds for row in group),
            seconds=fmean(row.seconds for row in group),
            seconds_per_step=fmean(row.seconds_per_step for row in group),
            scores=mean_scores(group),
        )
        for (precision, adapter), group in by_variant(rows).items()
    ]


def by_variant(rows: Iterable[Row]) -> dict[Variant, list[Row]]:
    """The rows of each (precision, adapter), in order of first appearance."""
    groups: dict[Variant, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.variant, []).append(row)
    return groups


def mean_scores(rows: Iterable[Row]) -> Scores:
    """The mean of each score over the rows where it is defined, in order of first appearance."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, score in row.scores.items():
            values.setdefault(name, []).extend([] if score is None else [score])
    return {name: fmean(defined) if defined else None for name, defined in values.items()}


def summary_of(comparison: Comparison) -> list[Summary]:
    """The summary that a comparison brings, or the means of its rows."""
    return comparison.summary or summarise(comparison.rows)


def score_names(entries: Iterable[Row | Summary]) -> list[str]:
    """Names of all scores, in order of first appearance."""
    return list(dict.fromkeys(name for entry in entries for name in entry.scores))


def score_of(summary: Summary, name: str) -> Estimate | None:
    """A score of a summary, with its limits if `intervals` has them."""
    mean = summary.scores.get(name)
    return None if mean is None else Estimate(mean, *(summary.intervals or {}).get(name, ()))


def by_memory(rows: Iterable[Row]) -> list[str]:
    """The precisions from the most memory to the least, then in order of appearance."""
    most: dict[str, int] = {}
    for row in rows:
        most[row.precision] = max(most.get(row.precision, 0), memory(row))
    return sorted(most, key=lambda precision: most[precision], reverse=True)


def memory(row: Row) -> int:
    """The bytes that tell a row's precision from others: on CUDA its peak; on a CPU the weights, since the resident set
    still holds what the process freed after the precisions before."""
    measured_on_cuda = row.stages["load"].peak_reserved_bytes is not None
    return row.peak_memory_bytes if measured_on_cuda else row.weights_bytes
