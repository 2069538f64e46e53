"""A comparison's figures as cells of tables: means a (precision, adapter), intervals where they are known, units."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any, NamedTuple

from infer.report.page import Cell

Row = dict[str, Any]
LINE = 160  # characters of a line in the terminal


class Estimate(NamedTuple):
    """A mean and its interval, which may be unknown."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval as text, nothing where it is unknown."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"


def estimate(score: Any) -> Estimate | None:
    """A score as results.json has it: a number, null, or an object with `mean` and perhaps `low` and `high`."""
    if isinstance(score, dict):
        return None if score.get("mean") is None else Estimate(score["mean"], score.get("low"), score.get("high"))
    return None if score is None else Estimate(score)


def score_of(entry: Row, key: str) -> Estimate | None:
    """A score of an entry of a summary, with its limits if `intervals` has them."""
    found = estimate(entry["scores"].get(key))
    limits = entry.get("intervals", {}).get(key)
    return found if found is None or not limits else Estimate(found.mean, *limits)


def summary_of(result: Row) -> list[Row]:
    """The summary that a result brings, or the means of its rows."""
    return result.get("summary") or summarise(result["rows"])


def summarise(rows: list[Row]) -> list[Row]:
    """One entry a (precision, adapter), in order of first appearance: means over its pictures, highest peak memory.

    A score's mean is over the pictures where it is defined, and None where it is defined for none.
    """
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["adapter"]), []).append(row)
    return [
        {
            "precision": precision,
            "adapter": adapter,
            "images": len(group),
            "weights_bytes": max(row["weights_bytes"] for row in group),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in group),
            "load_seconds": fmean(row["stages"]["load"]["seconds"] for row in group),
            "seconds": fmean(row["seconds"] for row in group),
            "seconds_per_step": fmean(row["seconds_per_step"] for row in group),
            "scores": means(group),
        }
        for (precision, adapter), group in groups.items()
    ]


def means(rows: Iterable[Row]) -> dict[str, float | None]:
    """The mean of each score over the rows where it is defined, in order of first appearance."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, score in row["scores"].items():
            found = estimate(score)
            values.setdefault(key, []).extend([] if found is None else [found.mean])
    return {key: fmean(defined) if defined else None for key, defined in values.items()}


def score_names(entries: Iterable[Row]) -> list[str]:
    """Names of all scores, in order of first appearance."""
    return list(dict.fromkeys(key for entry in entries for key in entry["scores"]))


def columns(summary: list[Row], peak: str) -> tuple[list[str], list[list[Cell]]]:
    """Titles and cells of the summary table; `peak` names the column of peak memory."""
    keys = score_names(summary)
    largest = {key: max(entry[key] for entry in summary) or 1 for key in ("weights_bytes", "peak_memory_bytes")}
    titles = ["precision", "adapter", "weights", peak, "load s", "s/image", "s/step", *keys]
    cells: list[list[Cell]] = []
    for entry in summary:
        names: list[Cell] = [(text, text, None) for text in (entry["precision"], entry["adapter"] or "none")]
        sizes: list[Cell] = [(size(entry[key]), entry[key], entry[key] / top) for key, top in largest.items()]
        numbers = [entry["load_seconds"], entry["seconds"], entry["seconds_per_step"]]
        cells.append(
            [*names, *sizes, *map(figure_cell, numbers), *(estimate_cell(score_of(entry, key)) for key in keys)]
        )
    return titles, cells


def differences(summary: list[Row]) -> tuple[list[str], list[list[Cell]]]:
    """Titles and cells of the paired differences that a summary has, without lines if it has none."""
    found = [(entry, to, scores) for entry in summary for to, scores in entry.get("differences", {}).items() if scores]
    keys = list(dict.fromkeys(key for _, _, scores in found for key in scores))
    cells: list[list[Cell]] = []
    for entry, to, scores in found:
        names = (entry["precision"], entry["adapter"] or "none", "no adapter" if to == "base" else to)
        cells.append([*((text, text, None) for text in names), *(figure_cell(scores.get(key)) for key in keys)])
    return ["precision", "adapter", "against", *keys], cells


def figure_cell(score: Any) -> Cell:
    """A score as results.json has it, as a cell."""
    return estimate_cell(estimate(score))


def estimate_cell(found: Estimate | None) -> Cell:
    """A mean as a cell, the interval below it."""
    return ("-", None, None) if found is None else (number(found.mean), found.mean, None, found.interval)


def plain(cell: Cell) -> str:
    """A cell as one line of text."""
    text, _, _, *notes = cell
    return " ".join([text, *(f"({note})" for note in notes if note)])


def aligned(lines: list[list[str]], names: int = 2) -> str:
    """Cells under their titles as plain text. The first `names` columns stand left, and again before each part of a
    table that is wider than a line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    parts: list[list[int]] = [[]]
    for i in range(names, len(widths)):
        if parts[-1] and sum(widths[j] + 2 for j in (*range(names), *parts[-1], i)) > LINE:
            parts.append([])
        parts[-1].append(i)

    def text(line: list[str], part: list[int]) -> str:
        left = [line[i].ljust(widths[i]) for i in range(names)]
        return "  ".join([*left, *(line[i].rjust(widths[i]) for i in part)]).rstrip()

    return "\n\n".join("\n".join(text(line, part) for line in ruled) for part in parts)


def by_memory(rows: list[Row]) -> list[str]:
    """The precisions from the most memory to the least, then in order of appearance."""
    most: dict[str, int] = {}
    for row in rows:
        most[row["precision"]] = max(most.get(row["precision"], 0), memory(row))
    return sorted(most, key=lambda precision: most[precision], reverse=True)


def memory(row: Row) -> int:
    """The bytes that tell a row's precision from others: on CUDA its peak; on a CPU the weights, since the resident set
    still holds what the process freed after the precisions before."""
    measured: int = row["peak_memory_bytes" if "peak_reserved_bytes" in row["stages"]["load"] else "weights_bytes"]
    return measured


def variant(adapter: str | None) -> str:
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


def markdown_table(lines: list[list[str]]) -> str:
    """Titles and cells as a table in Markdown, the first two columns of text."""
    rule = ["---", "---"] + ["---:"] * (len(lines[0]) - 2)
    return "".join("| " + " | ".join(line) + " |\n" for line in (lines[0], rule, *lines[1:]))
