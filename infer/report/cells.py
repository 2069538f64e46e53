"""Figures as text: numbers, bytes, cells of tables with their intervals, and tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from infer.report.means import score_names, score_of
from infer.report.page import Cell
from infer.report.results import Estimate, Summary

LINE = 160  # characters of a line in the terminal


def estimate(value: Any) -> Estimate | None:
    """A value of a section of results.json: a number, null, or an object with `mean` and perhaps `low` and `high`."""
    if isinstance(value, dict):
        return None if value.get("mean") is None else Estimate(value["mean"], value.get("low"), value.get("high"))
    return None if value is None else Estimate(value)


def interval_text(found: Estimate) -> str:
    """The limits as text, empty where they are unknown."""
    return "" if found.low is None or found.high is None else f"{number(found.low)} to {number(found.high)}"


def summary_cells(summary: Sequence[Summary], peak: str) -> tuple[list[str], list[list[Cell]]]:
    """Titles and cells of the table of costs and scores; `peak` names the column of peak memory."""
    names = score_names(summary)
    most_weights = max(entry.weights_bytes for entry in summary) or 1
    most_peak = max(entry.peak_memory_bytes for entry in summary) or 1
    titles = ["precision", "adapter", "weights", peak, "load s", "s/image", "s/step", *names]
    cells: list[list[Cell]] = [
        [
            text_cell(entry.precision),
            text_cell(entry.adapter or "none"),
            (size(entry.weights_bytes), entry.weights_bytes, entry.weights_bytes / most_weights),
            (size(entry.peak_memory_bytes), entry.peak_memory_bytes, entry.peak_memory_bytes / most_peak),
            *(number_cell(Estimate(s)) for s in (entry.load_seconds, entry.seconds, entry.seconds_per_step)),
            *(number_cell(score_of(entry, name)) for name in names),
        ]
        for entry in summary
    ]
    return titles, cells


def difference_cells(summary: Sequence[Summary]) -> tuple[list[str], list[list[Cell]]]:
    """Titles and cells of the paired differences that a summary has, without lines if it has none."""
    found = [(entry, to, scores) for entry in summary for to, scores in (entry.differences or {}).items() if scores]
    names = list(dict.fromkeys(name for _, _, scores in found for name in scores))
    cells: list[list[Cell]] = [
        [
            text_cell(entry.precision),
            text_cell(entry.adapter or "none"),
            text_cell("no adapter" if to == "base" else to),
            *(number_cell(scores.get(name)) for name in names),
        ]
        for entry, to, scores in found
    ]
    return ["precision", "adapter", "against", *names], cells


def text_cell(text: str) -> Cell:
    return text, text, None


def number_cell(found: Estimate | None) -> Cell:
    """A mean, with its limits below it."""
    return ("-", None, None) if found is None else (number(found.mean), found.mean, None, interval_text(found))


def plain(cell: Cell) -> str:
    """A cell as one line of text."""
    text, _, _, *notes = cell
    return " ".join([text, *(f"({note})" for note in notes if note)])


def text_table(lines: list[list[str]], names: int = 2, width: int = LINE) -> str:
    """Cells under their titles (the first line) for the terminal. The first `names` columns are aligned left, and are
    repeated in each part of a table that is wider than `width` characters. (tabulate neither parts a table nor cuts it
    to the terminal's width.)"""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    parts: list[list[int]] = [[]]  # columns
    for i in range(names, len(widths)):
        if parts[-1] and sum(widths[j] + 2 for j in (*range(names), *parts[-1], i)) > width:
            parts.append([])
        parts[-1].append(i)

    def text(line: list[str], part: list[int]) -> str:
        left = [line[i].ljust(widths[i]) for i in range(names)]
        return "  ".join([*left, *(line[i].rjust(widths[i]) for i in part)]).rstrip()

    return "\n\n".join("\n".join(text(line, part) for line in ruled) for part in parts)


def variant_text(adapter: str | None) -> str:
    return "without adapter" if adapter is None else f"with {adapter}"


def size(count: float) -> str:
    """Bytes as text."""
    value, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{value:.{0 if value >= 100 else 2}f} {unit}"


def number(value: float | None) -> str:
    """A number as text of about three digits."""
    if value is None:
        return "-"
    if 0 < abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{next(digits for digits, above in enumerate((1000, 100, 10, 0.1, 0)) if abs(value) >= above)}f}"
