"""Small charts as SVG within a page: lines over categories or numbers, intervals as whiskers, colours of the theme."""

import math
from collections.abc import Callable, Sequence
from html import escape

from infer.report.cells import Estimate, number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 52, 16, 12, 30  # of the drawing, and its margins
COLOURS = 6  # that the style has; more lines begin again
MARKS = ("M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0", "M-3 -3h6v6h-6z", "M0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z")

Line = tuple[str, Sequence[Estimate | None]]  # a name, and a value for each place on the x axis


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers from `low` to `high`, which they enclose."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def chart(
    title: str,
    places: Sequence[str] | Sequence[float],
    lines: Sequence[Line],
    show: Callable[[float], str] = number,
    zero: bool = False,
    note: str = "",
) -> str:
    """A figure: title, what the lines are, and the drawing.

    Args:
        places: along the x axis: names of categories, evenly spread, or numbers, at their distances.
        lines: a value for each place, or None where there is none.
        show: a value as text, on the axis and where the pointer rests.
        zero: the y axis begins at 0.
        note: below the title.
    """
    known = [e for _, values in lines for e in values if e is not None]
    if not known:
        return ""
    reach = [v for e in known for v in (e.mean, e.low, e.high) if v is not None]
    low, high = (min(0.0, *reach) if zero else min(reach)), max(reach)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    grid = ticks(low, high)
    low, high = grid[0], grid[-1]
    across = _across(places)

    def down(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in grid:
        y = f"{down(value):.1f}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy=".32em" text-anchor="end">{escape(f"{value:.6g}")}</text>')
    for i in range(len(places)) if len(places) <= 8 else range(0, len(places), math.ceil(len(places) / 8)):
        anchor, name = "middle", _short(places[i], len(places))
        parts.append(f'<text x="{across[i]:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(name)}</text>')
    for i, (name, values) in enumerate(lines):
        shift = (i - (len(lines) - 1) / 2) * 7 if any(e.low is not None for e in known) else 0.0
        parts.append(_line(name, values, [x + shift for x in across], places, down, show, i))
    legend = "".join(_key(name, i) for i, (name, values) in enumerate(lines) if any(values))
    text = f"{title}: " + "; ".join(
        f"{name} " + ", ".join(f"{place} {show(e.mean)}" for place, e in zip(places, values, strict=True) if e)
        for name, values in lines
        if any(values)
    )
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong>{legend}'
        f"{f'<small>{escape(note)}</small>' if note else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(text)}">{"".join(parts)}</svg></figure>'
    )


def _across(places: Sequence[str] | Sequence[float]) -> list[float]:
    room = WIDTH - LEFT - RIGHT
    numbers = [place for place in places if isinstance(place, int | float)]
    if len(numbers) < len(places):
        return [LEFT + room * (i + 0.5) / len(places) for i in range(len(places))]
    first, span = min(numbers), (max(numbers) - min(numbers)) or 1
    return [LEFT + 12 + (room - 24) * (value - first) / span for value in numbers]


def _short(place: str | float, count: int) -> str:
    text, most = f"{place:g}" if isinstance(place, int | float) else place, max(4, 56 // count)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _line(
    name: str,
    values: Sequence[Estimate | None],
    across: Sequence[float],
    places: Sequence[str] | Sequence[float],
    down: Callable[[float], float],
    show: Callable[[float], str],
    index: int,
) -> str:
    points = [(x, place, e) for x, place, e in zip(across, places, values, strict=True) if e is not None]
    parts = []
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{down(e.mean):.1f}" for x, _, e in points)
        parts.append(f'<polyline points="{path}"/>')
    for x, place, e in points:
        hint = f"{name}, {place}: {show(e.mean)}" if name else f"{place}: {show(e.mean)}"
        if e.low is not None and e.high is not None:
            hint += f" ({show(e.low)} to {show(e.high)})"
            top, foot = down(e.high), down(e.low)
            parts.append(f'<path d="M{x - 3:.1f} {top:.1f}h6m-3 0V{foot:.1f}m-3 0h6"/>')
        mark = MARKS[index % len(MARKS)]
        at = f"translate({x:.1f} {down(e.mean):.1f})"
        parts.append(f'<path class="mark" transform="{at}" d="{mark}"><title>{escape(hint)}</title></path>')
    return f'<g class="line c{index % COLOURS}">{"".join(parts)}</g>'


def _key(name: str, index: int) -> str:
    return (
        f'<span class="key"><svg viewBox="-6 -6 12 12" class="line c{index % COLOURS}" aria-hidden="true">'
        f'<path class="mark" d="{MARKS[index % len(MARKS)]}"/></svg>{escape(name)}</span>'
    )


def heat(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[Estimate | None]]) -> str:
    """A table whose cells are shaded by their value, the highest most."""
    known = [e.mean for line in values for e in line if e is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    parts = ['<table class="heat"><thead><tr><td></td>']
    parts += [f'<th scope="col" dir="auto">{escape(column)}</th>' for column in columns]
    parts.append("</tr></thead><tbody>")
    for name, line in zip(rows, values, strict=True):
        parts.append(f'<tr><th scope="row" dir="auto">{escape(name)}</th>')
        for e in line:
            if e is None:
                parts.append("<td>-</td>")
                continue
            small = f"<small>{escape(e.interval)}</small>" if e.interval else ""
            share = f"{8 + 62 * (e.mean - low) / span:.0f}%"
            parts.append(f'<td style="--heat: {share}">{escape(number(e.mean))}{small}</td>')
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table>"])
