"""Plots within a page: SVG in the colours of its style, a hint at each point, a description for screen readers."""

import math
from collections.abc import Callable, Sequence
from html import escape

from infer.report.cells import interval_text, number
from infer.report.page import SCROLL
from infer.report.plot import COLOURS, Heat, Lines, Series, enclosing_ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 52, 16, 12, 30  # of the drawing, and its margins
MARKS = ("M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0", "M-3 -3h6v6h-6z", "M0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z")
NAMED = 12  # points of a scatter that are named in the drawing; of more, only the filled ones


def draw_lines(plot: Lines) -> str:
    """A figure: title, what the lines are, and the drawing; empty if nothing is known."""
    if not plot.estimates:
        return ""
    grid = plot.y_ticks()
    to_x, to_y = _x_positions(plot.x), _axis(grid, HEIGHT - BOTTOM, TOP)
    parts = _y_grid(grid, to_y, LEFT)
    step = math.ceil(len(plot.x) / 8)
    parts += [_tick(to_x[i], _shortened(plot.x[i], len(plot.x))) for i in range(0, len(plot.x), step)]
    spread = 7 if any(e.low is not None for e in plot.estimates) else 0  # so that whiskers do not hide each other
    for i, one in enumerate(plot.series):
        shift = (i - (len(plot.series) - 1) / 2) * spread
        parts.append(_line(plot, one, [x + shift for x in to_x], to_y))
    drawn = [one for one in plot.series if any(one.values)]
    description = "; ".join(
        f"{one.name} " + ", ".join(f"{x} {plot.show(e.mean)}" for x, e in zip(plot.x, one.values, strict=True) if e)
        for one in drawn
    )
    note = f"<small>{escape(plot.note)}</small>" if plot.note else ""
    return _figure(plot.title, "".join(map(_key, drawn)) + note, description, parts)


def draw_scatter(
    titles: tuple[str, str],
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    filled: Sequence[bool],
    joined: Sequence[bool],
) -> str:
    """A figure with a circle for each point (x, y).

    Args:
        titles: of the x and the y axis.
        filled: whether a point's circle is filled, and the description says that it is on the front.
        joined: whether a dashed line leads through it, from left to right.
    """
    left = LEFT + 12  # room for six digits
    grids = [enclosing_ticks(min(values), max(values), 0.04) for values in zip(*points, strict=True)]
    to_x, to_y = _axis(grids[0], left, WIDTH - RIGHT), _axis(grids[1], HEIGHT - BOTTOM, TOP)
    parts = _y_grid(grids[1], to_y, left) + [_tick(to_x(value), f"{value:.6g}") for value in grids[0]]
    line = sorted({point for point, on_line in zip(points, joined, strict=True) if on_line})
    path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line)
    parts.append(f'<polyline points="{path}"/>' if len(line) > 1 else "")
    described = []
    for name, point, full in zip(names, points, filled, strict=True):
        x, y = to_x(point[0]), to_y(point[1])
        hint = f"{name}: {titles[0]} {number(point[0])}, {titles[1]} {number(point[1])}"
        described.append(hint + (" (front)" if full else ""))
        circle = f'<circle{" class=best" if full else ""} cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        parts.append(f"{circle}<title>{escape(hint)}</title></circle>")
        if full or len(points) <= NAMED:
            shift, anchor = (-8, "end") if x > (left + WIDTH - RIGHT) / 2 else (8, "start")
            parts.append(
                f'<text class="name" x="{x + shift:.1f}" y="{y:.1f}" dy=".32em" text-anchor="{anchor}">'
                f"{escape(name)}</text>"
            )
    return _figure(f"{titles[1]} against {titles[0]}", "", "; ".join(described), parts, "scatter")


def heat_table(heat: Heat) -> str:
    """A table whose cells are shaded by their value, the highest most."""
    low, high = min(heat.means, default=0.0), max(heat.means, default=0.0)
    parts = [SCROLL, '<table class="heat"><thead><tr><td></td>']
    parts += [f'<th scope="col" dir="auto">{escape(column)}</th>' for column in heat.columns]
    parts.append("</tr></thead><tbody>")
    for name, line in zip(heat.rows, heat.values, strict=True):
        parts.append(f'<tr><th scope="row" dir="auto">{escape(name)}</th>')
        for e in line:
            if e is None:
                parts.append("<td>-</td>")
                continue
            limits = interval_text(e)
            small = f"<small>{escape(limits)}</small>" if limits else ""
            share = f"{8 + 62 * (e.mean - low) / ((high - low) or 1):.0f}%"
            parts.append(f'<td style="--heat: {share}">{escape(number(e.mean))}{small}</td>')
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def _figure(title: str, legend: str, description: str, parts: list[str], kind: str = "") -> str:
    return (
        f'<figure class="{" ".join(filter(None, ("chart", kind)))}">'
        f"<figcaption><strong>{escape(title)}</strong>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {description}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _axis(grid: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """The first tick stands at pixel `start`, the last at `end`."""
    return lambda value: start + (value - grid[0]) / (grid[-1] - grid[0]) * (end - start)


def _x_positions(values: Sequence[str] | Sequence[float]) -> list[float]:
    room = WIDTH - LEFT - RIGHT
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return [LEFT + room * (i + 0.5) / len(values) for i in range(len(values))]
    first, span = min(numbers), (max(numbers) - min(numbers)) or 1
    return [LEFT + 12 + (room - 24) * (value - first) / span for value in numbers]


def _y_grid(grid: Sequence[float], to_y: Callable[[float], float], left: float) -> list[str]:
    parts = []
    for value in grid:
        y = f"{to_y(value):.1f}"
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" dy=".32em" text-anchor="end">{value:.6g}</text>')
    return parts


def _tick(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(text)}</text>'


def _shortened(value: str | float, count: int) -> str:
    text, most = f"{value:g}" if isinstance(value, int | float) else value, max(4, 56 // count)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _line(plot: Lines, one: Series, to_x: Sequence[float], to_y: Callable[[float], float]) -> str:
    known = [(i, e) for i, e in enumerate(one.values) if e is not None]
    points = [(to_x[i], plot.x[i], e) for i, e in known]
    parts = []
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{to_y(e.mean):.1f}" for x, _, e in points)
        parts.append(f'<polyline points="{path}"/>')
    for x, value, e in points:
        hint = f"{one.name}, {value}: {plot.show(e.mean)}" if one.name else f"{value}: {plot.show(e.mean)}"
        if e.low is not None and e.high is not None:
            hint += f" ({plot.show(e.low)} to {plot.show(e.high)})"
            top, foot = to_y(e.high), to_y(e.low)
            parts.append(f'<path d="M{x - 3:.1f} {top:.1f}h6m-3 0V{foot:.1f}m-3 0h6"/>')
        position = f"translate({x:.1f} {to_y(e.mean):.1f})"
        parts.append(f'<path class="mark" transform="{position}" d="{_mark(one)}"><title>{escape(hint)}</title></path>')
    return f'<g class="{_class(one)}">{"".join(parts)}</g>'


def _key(one: Series) -> str:
    return (
        f'<span class="key"><svg viewBox="-6 -6 12 12" class="{_class(one)}" aria-hidden="true">'
        f'<path class="mark" d="{_mark(one)}"/></svg>{escape(one.name)}</span>'
    )


def _mark(one: Series) -> str:
    return MARKS[one.colour % len(MARKS)]


def _class(one: Series) -> str:
    return f"line{' dashed' if one.dashed else ''} c{one.colour % len(COLOURS)}"
