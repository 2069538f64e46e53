"""The figure of a sensitivity: the error of each block's layers as a heat map."""

import re
from pathlib import Path
from typing import Any


def draw_heat(groups: list[dict[str, Any]], path: Path) -> None:
    """A PNG: one column a block, one row a group of layers that read one input, the velocity's error in percent when
    that group alone is NF4; what stands outside blocks has a column of its own."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    cells: dict[tuple[str, str], float] = {}
    for group in groups:
        match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)", group["layers"][0])
        column = "other" if match is None else f"{'s' if match[1] else 'd'}{match[2]}"
        name = group["layers"][0] if match is None else f"{'single' if match[1] else 'double'} {match[3]}"
        cells[name, column] = 100 * group["errors"]["nf4"] ** 0.5
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    values = np.full((len(rows), len(columns)), np.nan)
    for (name, column), value in cells.items():
        values[rows.index(name), columns.index(column)] = max(value, 1e-6)
    figure = Figure((4.5 + 0.34 * max(len(columns), 12), 1.4 + 0.26 * len(rows)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", norm=LogNorm(), cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title("error of the velocity when these layers alone are NF4, %", fontsize=9)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, format="png")
