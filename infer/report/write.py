"""A comparison's report: its rows become results.json, comparison.png, report.md and report.html in one folder.

A comparison is worth what people and programs can read off it: the JSON holds every figure that was measured, the
page opens offline and puts any two pictures side by side. The pictures themselves are in the folder already.

    python -m infer.report runs/compare/compare    # writes the report again from its results.json
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from infer.program.atomic import replace_file
from infer.report import page, sections
from infer.report.cells import (
    Row,
    aligned,
    by_memory,
    columns,
    estimate,
    figure_cell,
    means,
    memory,
    number,
    plain,
    score_names,
    score_of,
    size,
    summarise,
    summary_of,
    variant,
)
from infer.report.cells import differences as differing
from infer.report.curves import cost_charts, score_charts
from infer.report.figure import draw
from infer.report.gallery import Embedded, Grid, Group, embed, gallery, viewer
from infer.report.markdown import markdown
from infer.report.page import Cell, asset, contents, document, facts_list

__all__ = ["aligned", "by_memory", "differences", "figure", "render", "summarise", "table", "write"]
Table = tuple[str, list[str], list[list[Cell]], tuple[int, ...]]  # title, columns, lines, columns of text
SCORES = "Scores"
COSTS = 7  # columns of the summary that hold no score


def write(result: Row, folder: Path) -> None:
    """Writes the four files of a report, each whole or not at all; results.json comes last and says that all are there.

    Args:
        result: `model`, `device`, `versions`, `sampling` and `rows`; a score that is not defined is None, never NaN.
            Perhaps also `summary` (what `summarise` gives, with `intervals` and `differences`), `drift` (rows of
            prompts that the adapter has nothing to do with), `references` (what is known of the training pictures),
            `absent` (what was not measured -> why) and `sections` (see `infer.report.sections`).
        folder: holds the pictures, at each row's `image`.

    Raises:
        ValueError: there are no rows, a row's picture is absent, or a number is NaN or infinite.
    """
    rows = result["rows"] + result.get("drift", [])
    if not result["rows"]:
        raise ValueError("A report needs rows and got none: choose at least one precision, prompt and seed.")
    for i, row in enumerate(rows):
        if not (folder / row["image"]).is_file():
            name = f"{row['precision']}, {variant(row['adapter'])}, seed {row['seed']}"
            raise ValueError(f"Row {i} ({name}) has no picture: {folder / row['image']} is absent. Generate it again.")
    # All text is made before the first file is touched: what is wrong with the input leaves an old report whole.
    try:
        data = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"a report's numbers must be finite ({error}); measure again") from error
    groups = _groups(rows, folder)
    html = render(result, groups, embed(folder / row["image"] for row in rows))
    content = (_heading(rows), _facts(result), _tables(result), result.get("absent", {}), by_memory(rows))
    text = markdown(*content, groups, result.get("sections", ()))
    replace_file(folder / "comparison.png", lambda path: figure(result, folder, path))
    replace_file(folder / "report.md", lambda path: path.write_bytes(text.encode()))
    replace_file(folder / "report.html", lambda path: path.write_bytes(html.encode()))
    replace_file(folder / "results.json", lambda path: path.write_bytes(data.encode()))


def table(summary: list[Row]) -> str:
    """A summary as plain text for the terminal, in several tables where one would be too wide."""
    titles, cells = columns(summary, "peak memory")
    return aligned([titles, *(list(map(plain, line)) for line in cells)])


def differences(summary: list[Row]) -> str:
    """A summary's paired differences as plain text for the terminal; empty if it has none."""
    titles, cells = differing(summary)
    return aligned([titles, *(list(map(plain, line)) for line in cells)], 3) if cells else ""


def render(result: Row, groups: list[Group], embedded: dict[Path, Embedded]) -> str:
    """The whole page: pictures, tables, charts, and whatever else was measured."""
    rows, summary = result["rows"], summary_of(result)
    (_, costs), *scores = ((title, page.table(titles, cells, texts)) for title, titles, cells, texts in _tables(result))
    absent = "; ".join(f"{name} ({why})" for name, why in result.get("absent", {}).items())
    notes = _notes(result) + (f'<p class="absent">Not measured: {escape(absent)}.</p>' if absent else "")
    tables = "".join(f"<h3>{title}</h3>{body}" if title != SCORES else body for title, body in scores)
    unrelated = {row["prompt"] for row in result.get("drift", ())}
    charts = {"curves": cost_charts(rows, _peak(result)), "score-curves": score_charts(rows, summary)}
    drawn = {name: f'<div class="charts">{"".join(those)}</div>' for name, those in charts.items() if those}
    parts = [
        ("pictures", "Pictures", gallery(by_memory(rows), groups, embedded, unrelated) + _index(rows, groups)),
        ("cost", "Cost", f"{costs}<p>Times are means over the pictures.</p>"),
        ("scores", SCORES, tables + notes),
        ("curves", "Memory and time", drawn["curves"]),
        ("score-curves", "Scores by precision", drawn.get("score-curves", "")),
        *((f"more-{i}", more["title"], sections.to_html(more)) for i, more in enumerate(result.get("sections", ()))),
    ]
    parts = [part for part in parts if part[2]]
    linked = not all(picture.whole for picture in embedded.values())
    return document(
        _heading(rows),
        [facts_list(_facts(result)), contents([(name, title) for name, title, _ in parts])]
        + [f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' for name, title, body in parts],
        asset("report.css"),
        asset("report.js"),
        viewer(),
        " 'self' file:" if linked else "",  # the originals beside the page, where the viewer is asked for them
    )


def figure(result: Row, folder: Path, path: Path) -> None:
    """Draws the first prompt and seed at every precision, with the memory each precision takes, as a PNG at `path`."""
    rows = result["rows"]
    names = by_memory(rows)

    def curve(key: str) -> list[tuple[int, str]]:
        peaks = [max(row[key] for row in rows if row["precision"] == name) for name in names]
        return [(peak, size(peak)) for peak in peaks]

    curves = [(_peak(result), curve("peak_memory_bytes")), ("weights", curve("weights_bytes"))]
    prompt, [(_, grid), *_] = _groups(rows, folder)[0]
    draw(path, prompt, names, grid, curves)


def _tables(result: Row) -> list[Table]:
    """Tables of costs and, where there are any, of scores and of paired differences."""
    summary = summary_of(result)
    titles, cells = columns(summary, _peak(result))
    tables: list[Table] = [("Cost", titles[:COSTS], [line[:COSTS] for line in cells], (0, 1))]
    if len(titles) > COSTS:
        scores = [line[:2] + line[COSTS:] for line in cells]
        tables.append((SCORES, titles[:2] + titles[COSTS:], scores, (0, 1)))
    titles, cells = differing(summary)
    if cells:
        tables.append(("Differences at the same prompt and seed", titles, cells, (0, 1, 2)))
    return tables


def _notes(result: Row) -> str:
    """What the scores' table needs to be read."""
    summary, known, notes = summary_of(result), result.get("references") or {}, []
    if any((e := score_of(entry, key)) and e.interval for entry in summary for key in entry["scores"]):
        notes.append("Below each mean its 95 % bootstrap interval over prompts and seeds.")
    if known:
        usual = ", ".join(f"{key} {number(value)}" for key, value in known.items() if isinstance(value, float))
        notes.append(
            f"Training pictures: {known['count']} in {known['folder']}{f'; among themselves {usual}' if usual else ''}."
        )
    return f"<p>{escape(' '.join(notes))}</p>" if notes else ""


def _index(rows: list[Row], groups: list[Group]) -> str:
    """Every prompt with the means of its scores, which lead to its pictures."""
    if len(groups) < 2:
        return ""
    keys = score_names(rows)
    cells: list[list[Cell]] = []
    for i, (prompt, _) in enumerate(groups, start=1):
        found = means(row for row in rows if row["prompt"] == prompt)
        cells.append([(f"{i}", i, None), (prompt, prompt, None), *(figure_cell(found.get(key)) for key in keys)])
    links = [f"#prompt-{i}" for i in range(1, len(groups) + 1)]
    body = page.table(["prompt", "text", *keys], cells, [1], links)
    return (
        f'<details class="prompts"><summary>All {len(groups)} prompts with their mean scores</summary>{body}</details>'
    )


def _groups(rows: list[Row], folder: Path) -> list[Group]:
    """For each prompt its seeds, and for each of these the pictures, precisions ordered by memory."""
    # Rows that agree in all four hold the same picture (a prompt listed twice, say): one of them is shown.
    cells = {(row["prompt"], row["seed"], row["adapter"], row["precision"]): _picture(row, folder) for row in rows}
    adapters, names = list(dict.fromkeys(row["adapter"] for row in rows)), by_memory(rows)
    groups: dict[str, dict[int, Grid]] = {}
    for row in rows:
        prompt, seed = row["prompt"], row["seed"]
        groups.setdefault(prompt, {})[seed] = [
            (variant(adapter), [cells.get((prompt, seed, adapter, name)) for name in names]) for adapter in adapters
        ]
    return [(prompt, list(seeds.items())) for prompt, seeds in groups.items()]


def _picture(row: Row, folder: Path) -> Row:
    found = {key: estimate(value) for key, value in row["scores"].items()}
    scores = [f"{key} {number(e.mean)}" for key, e in found.items() if e is not None]
    scores += [f"nearest training picture {row['nearest']}"] if row.get("nearest") else []
    return {
        "file": folder / row["image"],
        "link": quote(row["image"]),
        "name": f"{row['precision']}, {variant(row['adapter'])}",
        "line": variant(row["adapter"]),
        "caption": f"{size(memory(row))} · {number(row['seconds'])} s",
        "short": " + ".join(filter(None, (row["precision"], row["adapter"]))),
        "scores": ", ".join(scores),
        "reference": row["precision"] == "bf16",
    }


def _heading(rows: Sequence[Row]) -> str:
    return "Comparison of " + ", ".join(dict.fromkeys(row["precision"] for row in rows))


def _facts(result: Row) -> dict[str, str]:
    names = ("versions", "sampling")
    pairs = {name: ", ".join(f"{key} {value}" for key, value in result[name].items()) for name in names}
    dtypes = {row["precision"]: row["compute_dtype"] for row in result["rows"] if "compute_dtype" in row}
    if dtypes:
        pairs["computed in"] = ", ".join(f"{precision} {dtype}" for precision, dtype in dtypes.items())
    return {"model": result["model"], "device": result["device"], **pairs}


def _peak(result: Row) -> str:
    """What peak memory means here: there is no allocator to ask on a CPU, only the process's size."""
    return "peak resident set" if result["device"].startswith("cpu") else "peak allocated"


def rewrite(folder: Path) -> None:
    """Write the report of a comparison again from its results.json.

    Raises:
        ValueError: there is none, or it is not one that was written here.
    """
    file = folder / "results.json"
    try:
        comparison = json.loads(file.read_bytes())
        if not isinstance(comparison, dict) or not isinstance(comparison["rows"], list):
            raise TypeError("it is no object with rows")
        write(comparison, folder)
        print(table(summary_of(comparison)))
    except (OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} holds no comparison that can be reported ({type(error).__name__}: {error}); give the folder that "
            "infer/compare.py wrote, or compare again"
        ) from error
    print(f"report: {folder / 'report.html'}")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("give one folder, as in python -m infer.report runs/compare/compare")
    rewrite(Path(arguments[0]))
