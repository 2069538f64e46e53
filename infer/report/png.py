"""Plots as PNG files, by matplotlib."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.report.plot import COLOURS, Heat, Lines
from infer.report.results import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144
GREY = "#888888"


def new_figure(width: float, height: float, dpi: int = DPI, **options: Any) -> "Figure":
    """An empty figure of inches, without a window; pyplot would keep it alive."""
    # here, not above: whoever imports the report without drawing does not wait for matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=dpi, **options)
    FigureCanvasAgg(figure)  # becomes the figure's canvas
    return figure


def save_lines(path: Path, plots: Sequence[Lines], x_title: str, log: Collection[int] = ()) -> None:
    """Plots over the same series side by side, limits as whiskers; the first has the legend.

    log: indices of the plots with a logarithmic y axis; the others have a line at 0.
    """
    figure = new_figure(5.5 * len(plots), 4.4, layout="constrained")
    for i, (axes, plot) in enumerate(zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True)):
        for one in plot.series:
            points = [(x, e) for x, e in zip(plot.x, one.values, strict=True) if e is not None]
            axes.errorbar(
                [x for x, _ in points], [e.mean for _, e in points], _whiskers([e for _, e in points]),
                label=one.name, color=COLOURS[one.colour % len(COLOURS)][0], linestyle="--" if one.dashed else "-",
                capsize=2, marker="o", markersize=3, linewidth=1.3,
            )  # fmt: skip
        axes.set_title(plot.title)
        axes.set_xlabel(x_title)
        axes.grid(alpha=0.25)
        if i in log:
            axes.set_yscale("log")
        else:
            axes.axhline(0, color=GREY, linewidth=0.8)
        if i == 0 and plot.series:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def _whiskers(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Lengths below and above the means; None where no limits are known."""
    if any(e.low is None or e.high is None for e in estimates):
        return None
    return [
        [max(e.mean - (e.low or 0.0), 0) for e in estimates],
        [max((e.high or 0.0) - e.mean, 0) for e in estimates],
    ]


def save_heats(path: Path, heats: Sequence[Heat], signed: Collection[int] = ()) -> None:
    """Heat maps side by side, whose cells say mean and limits.

    signed: indices of those whose colours say below or above 0.
    """
    import numpy as np

    columns, rows = len(heats[0].columns), len(heats[0].rows)
    figure = new_figure(2.6 + 2.9 * columns, 1.6 + 0.75 * rows, layout="constrained")
    for i, (axes, heat) in enumerate(zip(figure.subplots(1, len(heats), squeeze=False)[0], heats, strict=True)):
        values = _means(heat)
        bound = max(float(np.abs(values).max()), 1e-9)
        colours = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if i in signed else {"cmap": "viridis"}
        image = axes.imshow(values, aspect="auto", **colours)
        for (y, x), value in np.ndenumerate(values):
            e = heat.values[y][x]
            assert e is not None
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{e.mean:.4f}" if e.low is None else f"{e.mean:.4f}\n[{e.low:.4f}, {e.high:.4f}]"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks(range(columns), heat.columns)
        axes.set_yticks(range(rows), heat.rows)
        axes.set_xlabel(heat.x_title)
        axes.set_ylabel(heat.y_title)
        axes.set_title(heat.title, fontsize=9)
    figure.savefig(path, format="png")


def save_log_heat(path: Path, heat: Heat) -> None:
    """One heat map with many cells, without text in them, its colours on a logarithmic scale that stands beside it."""
    from matplotlib.colors import LogNorm

    figure = new_figure(4.5 + 0.34 * max(len(heat.columns), 12), 1.4 + 0.26 * len(heat.rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(_means(heat), aspect="auto", norm=LogNorm(), cmap="viridis")
    axes.set_xticks(range(len(heat.columns)), heat.columns, fontsize=7)
    axes.set_yticks(range(len(heat.rows)), heat.rows, fontsize=7)
    axes.set_title(heat.title, fontsize=9)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, format="png")


def _means(heat: Heat) -> Any:
    """[rows, columns], NaN where nothing is known."""
    import numpy as np

    return np.array([[np.nan if e is None else e.mean for e in line] for line in heat.values])
