"""What a plot shows, however it is drawn: series over x, heat maps, their colours, marks, limits and ticks.

Two rooms draw it: infer/report/svg.py for a page, coloured by its style in light and dark, with hints and a description
for screen readers; infer/report/png.py with matplotlib for a file. matplotlib's own SVG was tried for the page: 3.6
times as large, 150 times as slow, and its inline colours, ids and missing <title> had to be rewritten in every plot.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infer.report.cells import number
from infer.report.results import Estimate

# of series, on a light and on a dark ground; more series begin again
COLOURS = (
    ("#2f6fde", "#7fabff"),
    ("#c9611a", "#f0a05f"),
    ("#1f8a5b", "#5fca98"),
    ("#8c4bc4", "#c79bf0"),
    ("#b5314b", "#f58a9b"),
    ("#5d6b78", "#b3bec9"),
)
STYLE = "".join(f".c{i} {{ color: light-dark({light}, {dark}); }}\n" for i, (light, dark) in enumerate(COLOURS))


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    values: Sequence[Estimate | None]
    """One for each x; None where there is none."""
    colour: int
    """Index of its colour, modulo their number."""
    dashed: bool = False


@dataclass(frozen=True)
class Lines:
    """Series over categories or numbers, limits as whiskers."""

    title: str
    x: Sequence[str] | Sequence[float]
    """Names of categories, evenly spread, or numbers, at their distances."""
    series: Sequence[Series]
    show: Callable[[float], str] = number
    """A value as text."""
    zero: bool = False
    """The y axis begins at 0."""
    note: str = ""

    @property
    def estimates(self) -> list[Estimate]:
        """All that are known."""
        return [e for one in self.series for e in one.values if e is not None]

    def y_ticks(self) -> list[float]:
        """Round numbers that enclose all values and their limits."""
        reach = [value for e in self.estimates for value in e[:3] if value is not None]
        low, high = (min(0.0, *reach) if self.zero else min(reach)), max(reach)
        return enclosing_ticks(low, high, 0.0)


@dataclass(frozen=True)
class Heat:
    """A value for each row and column."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Estimate | None]]
    """A list for each row."""
    x_title: str = ""
    y_title: str = ""

    @property
    def means(self) -> list[float]:
        """Of all that are known."""
        return [e.mean for line in self.values for e in line if e is not None]


def series(lines: Sequence[tuple[str, Sequence[Estimate | None]]]) -> list[Series]:
    """Names and values as series of one colour each."""
    return [Series(name, values, i) for i, (name, values) in enumerate(lines)]


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers from `low` to `high`, which they enclose."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def enclosing_ticks(low: float, high: float, room: float) -> list[float]:
    """Ticks that enclose `low` and `high` with some room, a share of their distance; both may be the same."""
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        return ticks(low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0))
    return ticks(low - room * (high - low), high + room * (high - low))
