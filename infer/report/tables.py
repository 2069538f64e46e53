"""The tables of a comparison's report: costs, scores, paired differences, and every prompt with its means."""

from collections.abc import Sequence
from html import escape

from infer.report import page
from infer.report.cells import difference_cells, number, number_cell, summary_cells, text_cell
from infer.report.gallery import Group
from infer.report.means import mean_scores, score_names, score_of, summary_of
from infer.report.page import Cell
from infer.report.results import Comparison, Estimate, Row, Summary
from infer.report.words import arrow, explained_scores

Table = tuple[str, list[str], list[list[Cell]], tuple[int, ...]]  # title, columns, lines, columns of text
SCORES = "Scores"
DIFFERENCES = "Differences at the same prompt and seed"
COSTS = 7  # columns of the summary that hold no score
WIDE = 6  # columns of numbers that fit a screen


def peak_name(comparison: Comparison) -> str:
    """What peak memory means here: there is no allocator to ask on a CPU, only the process's size."""
    return "peak resident set" if comparison.device.startswith("cpu") else "peak allocated"


def cost_and_score_tables(comparison: Comparison) -> list[Table]:
    """Tables of costs and, where there are any, of scores and of paired differences."""
    summary = summary_of(comparison)
    titles, cells = summary_cells(summary, peak_name(comparison))
    tables: list[Table] = [("Cost", titles[:COSTS], [line[:COSTS] for line in cells], (0, 1))]
    if len(titles) > COSTS:
        scores = [line[:2] + line[COSTS:] for line in cells]
        signed = [f"{title}{arrow(title)}" for title in titles[COSTS:]]
        tables.append((SCORES, titles[:2] + signed, scores, (0, 1)))
    titles, cells = difference_cells(summary)
    if cells:
        tables.append((DIFFERENCES, titles, cells, (0, 1, 2)))
    return [part for table in tables for part in _parts(table)]


def _parts(table: Table) -> list[Table]:
    """A table that is too wide for a screen in parts, each with the columns of text."""
    title, titles, cells, texts = table
    numbers = [i for i in range(len(titles)) if i not in texts]
    chosen = [[*texts, *numbers[first : first + WIDE]] for first in range(0, len(numbers), WIDE)] or [list(texts)]
    return [
        (
            title if i == 0 else f"{title}, continued",
            [titles[column] for column in columns],
            [[line[column] for column in columns] for line in cells],
            texts,
        )
        for i, columns in enumerate(chosen)
    ]


def meanings(summary: Sequence[Summary]) -> str:
    """What each score means, below the tables of scores."""
    found = explained_scores(summary)
    if not found:
        return ""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in found)
    return f"<h3>What the scores mean</h3><dl>{pairs}</dl>"


def notes_on(comparison: Comparison) -> str:
    """What the scores' table needs to be read."""
    known, notes = comparison.references, []
    means = (score_of(entry, name) for entry in summary_of(comparison) for name in entry.scores)
    if any(mean is not None and mean.low is not None for mean in means):
        notes.append("Below each mean its 95 % bootstrap interval over prompts and seeds.")
    if known is not None and known.folder is not None:
        closeness = {"nearest_rms": known.nearest_rms, "nearest_dino": known.nearest_dino}
        usual = ", ".join(f"{name} {number(value)}" for name, value in closeness.items() if value is not None)
        notes.append(
            f"Training pictures: {known.count} in {known.folder}{f'; among themselves {usual}' if usual else ''}."
        )
    return f"<p>{escape(' '.join(notes))}</p>" if notes else ""


def index_of(rows: Sequence[Row], groups: list[Group]) -> str:
    """Every prompt with the means of its scores, which lead to its pictures."""
    if len(groups) < 2:
        return ""
    names = score_names(rows)
    cells: list[list[Cell]] = []
    for i, (prompt, _) in enumerate(groups, start=1):
        means = mean_scores(row for row in rows if row.asked == prompt)
        scores = [None if (mean := means.get(name)) is None else Estimate(mean) for name in names]
        cells.append([(f"{i}", i, None), text_cell(prompt), *map(number_cell, scores)])
    links = [f"#prompt-{i}" for i in range(1, len(groups) + 1)]
    table: Table = ("", ["prompt", "text", *names], cells, (0, 1))
    body = "".join(page.table(titles, part, [1], links) for _, titles, part, _ in _parts(table))
    return (
        f'<details class="prompts"><summary>All {len(groups)} prompts with their mean scores</summary>{body}</details>'
    )
