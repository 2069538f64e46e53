"""The figure of a transfer: heat maps of trained at x run at."""

from pathlib import Path
from typing import Any


def draw_matrix(summary: list[dict[str, Any]], path: Path) -> None:
    """A PNG: the loss, and what it costs not to have trained where the adapter runs; cells say mean and 95 % limits."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = [entry for entry in summary if entry["figure"] == "loss"]
    names = list(dict.fromkeys(entry["run"] for entry in chosen))
    figure = Figure((2.6 + 2.9 * len(names), 1.6 + 0.75 * len(names)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"mean": "validation loss", "cost": "loss above that of the adapter trained where it runs"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        cells = {(e["trained"], e["run"]): e[key] for e in chosen}
        values = np.array([[cells[t, r]["mean"] for r in names] for t in names])
        bound = max(float(np.abs(values).max()), 1e-9)
        limits: dict[str, Any] = {"cmap": "viridis"}
        if key == "cost":
            limits = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
        image = axes.imshow(values, aspect="auto", **limits)
        for (y, x), value in np.ndenumerate(values):
            cell = cells[names[y], names[x]]
            shade = image.cmap(image.norm(value))
            dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
            text = f"{value:.4f}\n[{cell['low']:.4f}, {cell['high']:.4f}]"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("run at")
        axes.set_ylabel("trained at")
        axes.set_title(title, fontsize=9)
    figure.savefig(path, format="png")
