"""The figure of a gap: by noise level, how far velocities are from the first precision's, and what that costs."""

from pathlib import Path
from typing import Any

COLOURS = ("#2f6fde", "#d9772b", "#3a9a5b", "#a34fb8", "#b0413e", "#6b6f76")


def draw_curves(summary: list[dict[str, Any]], path: Path) -> None:
    """A PNG with two panels; solid without, dashed with the adapter; bars are the 95 % limits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((11, 4.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    first = summary[0]["precision"]
    left, right = figure.subplots(1, 2)
    names = [n for n in dict.fromkeys(entry["precision"] for entry in summary) if n != first]
    adapters = list(dict.fromkeys(entry["adapter"] for entry in summary))
    for number, name in enumerate(names):
        for adapter in adapters:
            own = [e for e in summary if (e["precision"], e["adapter"]) == (name, adapter) and e["level"] is not None]
            label = name if adapter is None else f"{name} + {adapter}"
            for axes, key, scale in ((left, "error", 100), (right, "cost", 1)):
                mean = [scale * entry[key]["mean"] for entry in own]
                limits = None
                if own[0][key]["low"] is not None:
                    below = [scale * (e[key]["mean"] - e[key]["low"]) for e in own]
                    above = [scale * (e[key]["high"] - e[key]["mean"]) for e in own]
                    limits = [[max(x, 0) for x in below], [max(x, 0) for x in above]]
                axes.errorbar(
                    [entry["sigma"] for entry in own], mean, limits, label=label, capsize=2, marker="o", markersize=3,
                    color=COLOURS[number % len(COLOURS)], linestyle="-" if adapter is None else "--", linewidth=1.3,
                )  # fmt: skip
    left.set_title(f"velocity: error relative to {first}, %")
    left.set_yscale("log")
    right.set_title(f"loss above {first}'s, same picture and noise")
    right.axhline(0, color="#888", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("noise level (0: the picture, 1: noise)")
        axes.grid(alpha=0.25)
    if names:
        left.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")
