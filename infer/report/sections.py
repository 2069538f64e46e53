"""What else a comparison measured, as results.json has it under `sections`, for page and Markdown alike.

A section is an object with a `title`, perhaps a `note`, and one of

- `table`: `columns` (names) and `rows` (lists of text, numbers, null or estimates),
- `lines`: `x` (the axis' name), `places` (numbers or names along it) and `series` (name -> a value for each place),
- `matrix`: `rows`, `columns` (names) and `values` (a list a row).

A value is a number, null, or an estimate: an object with `mean` and perhaps `low` and `high`.
"""

from collections.abc import Callable
from html import escape
from typing import Any

from infer.report.cells import estimate, number_cell, plain, text_cell
from infer.report.page import Cell, table
from infer.report.plot import Heat, Lines, series
from infer.report.svg import draw_lines, heat_table

KINDS = ("table", "lines", "matrix")


def check(section: dict[str, Any]) -> str:
    """The section's kind.

    Raises:
        ValueError: it has none or several, or its parts differ in length.
    """
    kinds = [kind for kind in KINDS if kind in section]
    if len(kinds) != 1:
        raise ValueError(
            f"section {section.get('title')!r} has {kinds or 'nothing'}; it needs one of {', '.join(KINDS)}"
        )
    body = section[kinds[0]]
    columns, lines = (
        (body["places"], list(body["series"].values()))
        if kinds[0] == "lines"
        else (body["columns"], body["rows" if kinds[0] == "table" else "values"])
    )
    short = next((line for line in lines if len(line) != len(columns)), None)
    if short is not None:
        raise ValueError(
            f"section {section.get('title')!r} has {len(short)} values where there are {len(columns)} columns"
        )
    return kinds[0]


def to_html(section: dict[str, Any]) -> str:
    """Markup, without the title."""
    kind = check(section)
    body, note = section[kind], f"<p>{escape(section['note'])}</p>" if section.get("note") else ""
    if kind == "lines":
        lines = [(name, [estimate(value) for value in values]) for name, values in body["series"].items()]
        plot = Lines(body["x"], body["places"], series(lines))
        return f'{note}<div class="charts wide">{draw_lines(plot)}</div>'
    if kind == "matrix":
        values = [[estimate(value) for value in line] for line in body["values"]]
        return note + heat_table(Heat(section["title"], body["rows"], body["columns"], values))
    cells = _cells(body["rows"])
    texts = [i for i in range(len(body["columns"])) if any(isinstance(row[i], str) for row in body["rows"])]
    return note + table(body["columns"], cells, texts)


def to_markdown(section: dict[str, Any], line: Callable[[list[str]], str]) -> list[str]:
    """Lines of a Markdown table; `line` makes one of a list of texts."""
    kind = check(section)
    body = section[kind]
    if kind == "table":
        columns, rows = list(body["columns"]), [list(map(plain, cells)) for cells in _cells(body["rows"])]
    elif kind == "matrix":
        columns = ["", *body["columns"]]
        rows = [
            [name, *(plain(_value_cell(value)) for value in values)]
            for name, values in zip(body["rows"], body["values"], strict=True)
        ]
    else:
        columns = [body["x"], *body["series"]]
        rows = [
            [f"{place:g}" if isinstance(place, int | float) else place, *map(plain, map(_value_cell, values))]
            for place, *values in zip(body["places"], *body["series"].values(), strict=True)
        ]
    return [line(columns), line(["---", *["---:"] * (len(columns) - 1)]), *map(line, rows)]


def _cells(rows: list[list[Any]]) -> list[list[Cell]]:
    return [[text_cell(value) if isinstance(value, str) else _value_cell(value) for value in row] for row in rows]


def _value_cell(value: Any) -> Cell:
    return number_cell(estimate(value))
