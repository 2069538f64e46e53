"""Which points of a sweep no other beats, and a drawing of them."""

import math
from collections.abc import Sequence
from html import escape

from infer.report.cells import number
from infer.report.chart import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, ticks

STYLE = """
.front-chart circle { fill: var(--card); stroke: var(--soft); stroke-width: 1.5; }
.front-chart .best { fill: var(--accent); stroke: var(--accent); }
.front-chart polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 3 3; }
.front-chart .name { font-size: 10px; }
.list th, .list td { padding: .45rem .75rem; text-align: left; font-size: .875rem; overflow-wrap: anywhere; }
"""
LEFT = 64  # room for six digits
MANY = 12  # points that are named in the drawing; of more, only the front


def front_of(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[bool]:
    """Whether each point is on the Pareto front: none is at least as good in every objective and better in one.

    Args:
        points: the objectives of each.
        directions: minimize or maximize, for each objective.
    """
    signs = [1 if direction == "minimize" else -1 for direction in directions]
    costs = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]

    def beats(a: list[float], b: list[float]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [not any(beats(other, cost) for other in costs) for cost in costs]


def scatter(
    titles: tuple[str, str],
    directions: tuple[str, str],
    names: Sequence[str],
    places: Sequence[tuple[float, float]],
    front: Sequence[bool],
) -> str:
    """A figure with a circle a point; joined are those that nothing beats in these two objectives.

    Args:
        titles: of the x and the y axis.
        directions: minimize or maximize, for each axis.
        front: whether each point is on the front of all objectives; its circle is filled.
    """
    x_title, y_title = titles
    grid = [_grid([place[axis] for place in places]) for axis in (0, 1)]

    def at(place: tuple[float, float]) -> tuple[float, float]:
        shares = [(place[axis] - grid[axis][0]) / (grid[axis][-1] - grid[axis][0]) for axis in (0, 1)]
        return LEFT + shares[0] * (WIDTH - LEFT - RIGHT), TOP + (1 - shares[1]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in grid[1]:
        height = f"{at((grid[0][0], value))[1]:.1f}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height}" dy=".32em" text-anchor="end">{value:.6g}</text>')
    for value in grid[0]:
        x = at((value, grid[1][0]))[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:.6g}</text>')
    joined = sorted({place for place, best in zip(places, front_of(places, directions), strict=True) if best})
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, joined))
    parts.append(f'<polyline points="{path}"/>' if len(joined) > 1 else "")
    said = []
    for name, place, best in zip(names, places, front, strict=True):
        x, y = at(place)
        hint = f"{name}: {x_title} {number(place[0])}, {y_title} {number(place[1])}"
        said.append(hint + (" (front)" if best else ""))
        mark = f'<circle{" class=best" if best else ""} cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        parts.append(f"{mark}<title>{escape(hint)}</title></circle>")
        if best or len(places) <= MANY:
            left = x > (LEFT + WIDTH - RIGHT) / 2
            parts.append(
                f'<text class="name" x="{x + (-8 if left else 8):.1f}" y="{y:.1f}" dy=".32em" '
                f'text-anchor="{"end" if left else "start"}">{escape(name)}</text>'
            )
    title = f"{y_title} against {x_title}"
    return (
        f'<figure class="chart front-chart"><figcaption><strong>{escape(title)}</strong></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title + ": " + "; ".join(said))}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _grid(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values with some room."""
    low, high = min(values), max(values)
    alike = high - low <= 1e-9 * max(abs(high), abs(low))
    room = (abs(high) * 0.1 or 1.0) if alike else 0.04 * (high - low)
    grid = ticks(low - room, high + room)
    assert math.isfinite(grid[0]) and len(grid) > 1
    return grid
