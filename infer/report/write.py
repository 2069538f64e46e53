"""A comparison's report: results.json, comparison.png, report.md and report.html in one folder.

A comparison is worth what people and programs can read off it: the JSON holds every figure that was measured, the
page opens offline and puts any two pictures side by side. The pictures themselves are in the folder already.

    python -m infer.report runs/compare/compare    # writes the report again from its results.json
"""

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from infer.program.atomic import replace_file
from infer.report import page, sections
from infer.report.cells import (
    difference_cells,
    number,
    number_cell,
    size,
    summary_cells,
    text_cell,
    text_table,
    variant_text,
)
from infer.report.curves import cost_plots, score_plots
from infer.report.figure import draw
from infer.report.gallery import GIVEN, Embedded, Grid, Group, Picture, embed, gallery, viewer
from infer.report.markdown import markdown
from infer.report.means import by_memory, mean_scores, memory, score_names, score_of, summary_of
from infer.report.page import Cell, asset, contents, document, facts_list
from infer.report.plot import STYLE
from infer.report.results import Comparison, Estimate, Row, Summary, read_results, results_text
from infer.report.svg import draw_lines
from infer.report.words import ELSEWHERE, arrow, explained_scores, in_words, unmeasured

Table = tuple[str, list[str], list[list[Cell]], tuple[int, ...]]  # title, columns, lines, columns of text
SCORES = "Scores"
DIFFERENCES = "Differences at the same prompt and seed"
COSTS = 7  # columns of the summary that hold no score
WIDE = 6  # columns of numbers that fit a screen


def write(comparison: Comparison, folder: Path) -> None:
    """Writes the four files of a report, each whole or not at all; results.json comes last and says that all are there.

    Args:
        folder: holds the pictures, at each row's `image`.

    Raises:
        ValueError: there are no rows, a row's picture is absent, or a number is NaN or infinite.
    """
    rows = comparison.all_rows
    if not comparison.rows:
        raise ValueError("A report needs rows and got none: choose at least one precision, prompt and seed.")
    for i, row in enumerate(rows):
        for file in (row.image, *(row.references or ())):
            if not (folder / file).is_file():
                name = f"{row.precision}, {variant_text(row.adapter)}, seed {row.seed}"
                raise ValueError(f"Row {i} ({name}) has no picture: {folder / file} is absent. Generate it again.")
    # All text is made before the first file is touched: what is wrong with the input leaves an old report whole.
    try:
        data = results_text(comparison)
    except ValueError as error:
        raise ValueError(f"a report's numbers must be finite ({error}); measure again") from error
    groups = _groups(rows, folder)
    files = [folder / name for row in rows for name in (row.image, *(row.references or ()))]
    html = render(comparison, groups, embed(files))
    said = in_words(comparison), explained_scores(summary_of(comparison)), unmeasured(comparison)
    content = (_heading(rows), _facts(comparison), _tables(comparison), said, by_memory(rows))
    text = markdown(*content, groups, comparison.sections or ())
    replace_file(folder / "comparison.png", lambda path: draw_figure(comparison, folder, path))
    replace_file(folder / "report.md", lambda path: path.write_bytes(text.encode()))
    replace_file(folder / "report.html", lambda path: path.write_bytes(html.encode()))
    replace_file(folder / "results.json", lambda path: path.write_bytes(data.encode()))


def render(comparison: Comparison, groups: list[Group], embedded: dict[Path, Embedded]) -> str:
    """The whole page: pictures, tables, plots, and whatever else was measured."""
    rows, summary, peak = comparison.rows, summary_of(comparison), _peak(comparison)
    (_, costs), *scores = ((table[0], page.table(*table[1:])) for table in _tables(comparison))
    absent = unmeasured(comparison)
    notes = _meanings(summary) + _notes(comparison) + (f'<p class="absent">{escape(absent)}</p>' if absent else "")
    tables = "".join(f"<h3>{title}</h3>{body}" if title != SCORES else body for title, body in scores)
    apart = {
        row.asked: ELSEWHERE[kind]
        for kind, found in (("drift", comparison.drift), ("bleed", comparison.bleed))
        for row in found or ()
    }
    parts = [
        ("pictures", "Pictures", gallery(by_memory(rows), groups, embedded, apart) + _index(rows, groups)),
        ("cost", "Cost", f"{costs}<p>Times are means over the pictures.</p>"),
        ("scores", SCORES, tables + notes),
        ("curves", "Memory and time", _drawn(map(draw_lines, cost_plots(rows, peak)))),
        ("score-curves", "Scores by precision", _drawn(map(draw_lines, score_plots(rows, summary)))),
        *((f"more-{i}", more["title"], sections.to_html(more)) for i, more in enumerate(comparison.sections or ())),
        ("about", "About this comparison", facts_list(_facts(comparison))),
    ]
    parts = [part for part in parts if part[2]]
    linked = not all(picture.whole for picture in embedded.values())
    return document(
        _heading(rows),
        [f'<p class="words">{escape(" ".join(in_words(comparison)))}</p>', contents([part[:2] for part in parts])]
        + [f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' for name, title, body in parts],
        asset("report.css") + STYLE,
        asset("report.js"),
        viewer(),
        " 'self' file:" if linked else "",  # the originals beside the page, where the viewer is asked for them
    )


def draw_figure(comparison: Comparison, folder: Path, path: Path) -> None:
    """Draws the first prompt and seed at every precision, with the memory each precision takes, as a PNG at `path`."""
    names = by_memory(comparison.rows)
    of_precision = [[row for row in comparison.rows if row.precision == name] for name in names]
    peaks = [max(row.peak_memory_bytes for row in rows) for rows in of_precision]
    weights = [max(row.weights_bytes for row in rows) for rows in of_precision]
    curves = [
        (title, [(count, size(count)) for count in counts])
        for title, counts in ((_peak(comparison), peaks), ("weights", weights))
    ]
    prompt, [(_, grid), *_] = _groups(comparison.rows, folder)[0]
    draw(path, prompt, names, grid, curves)


def _drawn(figures: Iterable[str]) -> str:
    body = "".join(figures)
    return f'<div class="charts">{body}</div>' if body else ""


def _tables(comparison: Comparison) -> list[Table]:
    """Tables of costs and, where there are any, of scores and of paired differences."""
    summary = summary_of(comparison)
    titles, cells = summary_cells(summary, _peak(comparison))
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


def _meanings(summary: Sequence[Summary]) -> str:
    """What each score means, below the tables of scores."""
    found = explained_scores(summary)
    if not found:
        return ""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in found)
    return f"<h3>What the scores mean</h3><dl>{pairs}</dl>"


def _notes(comparison: Comparison) -> str:
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


def _index(rows: Sequence[Row], groups: list[Group]) -> str:
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


def _groups(rows: Sequence[Row], folder: Path) -> list[Group]:
    """For each prompt its seeds, and for each of these the pictures, precisions ordered by memory."""
    # Rows that agree in all four hold the same picture (a prompt listed twice, say): one of them is shown.
    pictures = {(row.asked, row.seed, row.adapter, row.precision): _picture(row, folder) for row in rows}
    adapters, names = list(dict.fromkeys(row.adapter for row in rows)), by_memory(rows)
    groups: dict[str, dict[int, Grid]] = {}
    for row in rows:
        groups.setdefault(row.asked, {})[row.seed] = [
            *_references(row, folder, len(names)),
            *(
                (variant_text(adapter), [pictures.get((row.asked, row.seed, adapter, name)) for name in names])
                for adapter in adapters
            ),
        ]
    return [(prompt, list(seeds.items())) for prompt, seeds in groups.items()]


def _references(row: Row, folder: Path, columns: int) -> Grid:
    """The reference pictures of a row's prompt, as lines of its grid."""
    count = len(row.references or ())
    shown: list[Picture | None] = [
        Picture(folder / name, quote(name), f"reference {i}", f"reference {i}", "reference", GIVEN, "", False)
        for i, name in enumerate(row.references or (), start=1)
    ]
    shown += [None] * (-count % columns)
    return [("reference" + "s" * (count > 1), shown[i : i + columns]) for i in range(0, len(shown), columns)]


def _picture(row: Row, folder: Path) -> Picture:
    scores = [f"{name} {number(score)}" for name, score in row.scores.items() if score is not None]
    scores += [f"nearest training picture {row.nearest}"] if row.nearest else []
    return Picture(
        file=folder / row.image,
        link=quote(row.image),
        name=f"{row.precision}, {variant_text(row.adapter)}",
        short=" + ".join(filter(None, (row.precision, row.adapter))),
        line=variant_text(row.adapter),
        caption=f"{size(memory(row))} · {number(row.seconds)} s",
        scores=", ".join(scores),
        reference=row.precision == "bf16",
    )


def _heading(rows: Sequence[Row]) -> str:
    return "Comparison of " + ", ".join(dict.fromkeys(row.precision for row in rows))


def _facts(comparison: Comparison) -> dict[str, str]:
    facts = {"model": comparison.model, "device": comparison.device}
    for name, given in (("versions", comparison.versions), ("sampling", comparison.sampling)):
        facts[name] = ", ".join(f"{key} {value}" for key, value in given.items())
    dtypes = {row.precision: row.compute_dtype for row in comparison.rows if row.compute_dtype is not None}
    if dtypes:
        facts["computed in"] = ", ".join(f"{precision} {dtype}" for precision, dtype in dtypes.items())
    return facts


def _peak(comparison: Comparison) -> str:
    """What peak memory means here: there is no allocator to ask on a CPU, only the process's size."""
    return "peak resident set" if comparison.device.startswith("cpu") else "peak allocated"


def rewrite(folder: Path) -> None:
    """Write the report of a comparison again from its results.json.

    Raises:
        ValueError: there is none, or it is not one that was written here.
    """
    file = folder / "results.json"
    comparison = read_results(file)
    try:
        write(comparison, folder)
    except (OSError, LookupError, TypeError, AttributeError) as error:  # a picture that is none, a section's content
        raise ValueError(
            f"{file} holds no comparison that can be reported ({type(error).__name__}: {error}); give the folder that "
            "infer/compare.py wrote, or compare again"
        ) from error
    print_comparison(comparison)
    print(f"report: {folder / 'report.html'}")


def print_comparison(comparison: Comparison) -> None:
    """What a comparison has shown, for the terminal: words, costs and scores, what the scores mean."""
    summary = summary_of(comparison)
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    print("\n".join(textwrap.wrap(" ".join(in_words(comparison)), width)))
    titles, cells = summary_cells(summary, "peak memory")
    lines = [[f"{title}{arrow(title)}" for title in titles], *([cell[0] for cell in line] for line in cells)]
    for columns in (range(COSTS), (0, 1, *range(COSTS, len(titles)))):
        if len(columns) > 2:
            print(f"\n{text_table([[line[i] for i in columns] for line in lines], width=width)}")
    print()
    for name, what in explained_scores(summary):
        print("\n".join(textwrap.wrap(f"{name}: {what}", width, subsequent_indent="  ")))
    print("\n".join(textwrap.wrap(unmeasured(comparison), width, subsequent_indent="  ")))
    print("The report has limits, paired differences and the pictures.")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("give one folder, as in python -m infer.report runs/compare/compare")
    rewrite(Path(arguments[0]))
