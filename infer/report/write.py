"""A comparison's report: results.json, comparison.png, report.md and report.html in one folder.

A comparison is worth what people and programs can read off it: the JSON holds every figure that was measured, the
page opens offline and puts any two pictures side by side. The pictures themselves are in the folder already.

    python -m infer.report runs/compare/compare    # writes the report again from its results.json
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from infer.program.atomic import replace_file
from infer.report import page, sections
from infer.report.cells import size, variant_text
from infer.report.curves import cost_plots, score_plots
from infer.report.figure import draw
from infer.report.gallery import Embedded, Group, embed, gallery, viewer
from infer.report.markdown import markdown
from infer.report.means import by_memory, summary_of
from infer.report.page import asset, contents, document, facts_list
from infer.report.pictures import groups_of
from infer.report.plot import STYLE
from infer.report.results import Comparison, Row, read_results, results_text
from infer.report.svg import draw_lines
from infer.report.tables import SCORES, cost_and_score_tables, index_of, meanings, notes_on, peak_name
from infer.report.terminal import print_comparison
from infer.report.words import ELSEWHERE, explained_scores, in_words, unmeasured


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
    groups = groups_of(rows, folder)
    files = [folder / name for row in rows for name in (row.image, *(row.references or ()))]
    html = render(comparison, groups, embed(files))
    said = in_words(comparison), explained_scores(summary_of(comparison)), unmeasured(comparison)
    content = (_heading(rows), _facts(comparison), cost_and_score_tables(comparison), said, by_memory(rows))
    text = markdown(*content, groups, comparison.sections or ())
    replace_file(folder / "comparison.png", lambda path: draw_figure(comparison, folder, path))
    replace_file(folder / "report.md", lambda path: path.write_bytes(text.encode()))
    replace_file(folder / "report.html", lambda path: path.write_bytes(html.encode()))
    replace_file(folder / "results.json", lambda path: path.write_bytes(data.encode()))


def render(comparison: Comparison, groups: list[Group], embedded: dict[Path, Embedded]) -> str:
    """The whole page: pictures, tables, plots, and whatever else was measured."""
    rows, summary, peak = comparison.rows, summary_of(comparison), peak_name(comparison)
    (_, costs), *scores = ((table[0], page.table(*table[1:])) for table in cost_and_score_tables(comparison))
    absent = unmeasured(comparison)
    notes = meanings(summary) + notes_on(comparison) + (f'<p class="absent">{escape(absent)}</p>' if absent else "")
    tables = "".join(f"<h3>{title}</h3>{body}" if title != SCORES else body for title, body in scores)
    apart = {
        row.asked: ELSEWHERE[kind]
        for kind, found in (("drift", comparison.drift), ("bleed", comparison.bleed))
        for row in found or ()
    }
    parts = [
        ("pictures", "Pictures", gallery(by_memory(rows), groups, embedded, apart) + index_of(rows, groups)),
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
        for title, counts in ((peak_name(comparison), peaks), ("weights", weights))
    ]
    prompt, [(_, grid), *_] = groups_of(comparison.rows, folder)[0]
    draw(path, prompt, names, grid, curves)


def _drawn(figures: Iterable[str]) -> str:
    body = "".join(figures)
    return f'<div class="charts">{body}</div>' if body else ""


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


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("give one folder, as in python -m infer.report runs/compare/compare")
    rewrite(Path(arguments[0]))
