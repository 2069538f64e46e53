"""A comparison's figure: one column a precision, pictures above, memory curves below, saved as one PNG.

Everything is laid out in pixels, and pictures are copied onto the figure at a whole multiple of their size, or reduced
once by Pillow: matplotlib's own resampling would blur the detail that a comparison is about.

    python -m infer.report runs/compare    # draws it again, with the rest of the report
"""

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from infer.report.gallery import GIVEN, Grid
from infer.report.plot import COLOURS
from infer.report.png import new_figure

DPI = 256  # a power of two: pixels / DPI * DPI is exact, so the PNG has the size that was laid out
INK, GREY = "#1b1f24", "#667079"
EDGE, SIDE, GAP, LABEL, PANEL = 40, 80, 32, 84, 250  # pixels: margin, row names, between cells, captions, a curve


def cell_size(width: int, height: int) -> tuple[int, int]:
    """Size in pixels at which a picture is shown: about 400 on its longer side, and a whole multiple if enlarged."""
    side = max(width, height)
    scale = max(1, round(400 / side)) if side <= 512 else 512 / side
    return round(width * scale), round(height * scale)


def draw(
    path: Path,
    title: str,
    columns: list[str],
    rows: Grid,
    curves: list[tuple[str, list[tuple[int, str]]]],
) -> None:
    """Saves the figure.

    Args:
        path: where the PNG goes, whatever its suffix.
        title: the prompt; shown as it is, wrapped.
        columns: names of the precisions, from left to right.
        rows: name of a row and, for each column, its picture, or None where there is none.
        curves: name of a curve and, for each column, its value and the text beside the point.
    """
    import matplotlib  # here, not above: whoever imports the report without drawing does not wait for it
    import numpy as np

    with Image.open(next(picture.file for _, pictures in rows for picture in pictures if picture)) as image:
        cell_w, cell_h = cell_size(*image.size)
    grid_w = len(columns) * (cell_w + GAP) - GAP
    width = max(SIDE + grid_w + EDGE, 1000)  # room for a title over a single column
    left = (width - grid_w + SIDE - EDGE) // 2
    lines = textwrap.wrap(title, (width - 2 * EDGE) // 19, max_lines=4, placeholder=" …")
    top = EDGE + 46 * len(lines) + (GAP if lines else 0)
    panels = top + len(rows) * (LABEL + cell_h + GAP)
    height = panels + len(curves) * PANEL + EDGE

    # parse_math: "$" and "_" in a prompt are text. Line breaks are ours, so that the height above is right.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = new_figure(width / DPI, height / DPI, DPI, facecolor="white")

        def write(x: float, y: float, text: str, pixels: float, room: float, **style: Any) -> None:
            """Text at (x, y) pixels from the top left, made smaller where it would be longer than `room`."""
            points = pixels * 72 / DPI
            artist = figure.text(x / width, 1 - y / height, text, fontsize=points, **style)
            box = artist.get_window_extent()
            artist.set_fontsize(points * min(1, room / max(box.width, box.height, 1)))

        style = {"ha": "center", "va": "top", "color": INK}
        for i, line in enumerate(lines):
            write(width / 2, EDGE + 46 * i, line, 33, width - 2 * EDGE, **style)
        for r, (name, pictures) in enumerate(rows):
            y = top + r * (LABEL + cell_h + GAP) + LABEL
            write(left - 24, y + cell_h / 2, name, 27, cell_h, rotation=90, ha="right", va="center", color=GREY)
            for c, picture in enumerate(pictures):
                if picture is None:
                    continue
                x = left + c * (cell_w + GAP)
                with Image.open(picture.file) as image:
                    enlarged = max(image.size) <= max(cell_w, cell_h)
                    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
                    pixels = image.convert("RGB").resize((cell_w, cell_h), method)
                figure.figimage(np.asarray(pixels), x, height - y - cell_h, origin="upper")
                over = columns[c] if picture.caption != GIVEN else picture.short
                write(x, y - 48, over, 29, cell_w, va="baseline", color=INK, weight="bold")
                write(x, y - 14, picture.caption, 24, cell_w, va="baseline", color=GREY)

        centres = [c * (cell_w + GAP) + cell_w / 2 for c in range(len(columns))]
        for p, (name, points) in enumerate(curves):
            y, colour = panels + p * PANEL, COLOURS[p % len(COLOURS)][0]
            write(left, y + 12, name, 27, grid_w, va="top", color=colour, weight="bold")
            low = y + PANEL - 46  # the precisions' names stand below
            plot = figure.add_axes((left / width, 1 - low / height, grid_w / width, (PANEL - 110) / height))
            values = [value for value, _ in points]
            plot.plot(centres, values, color=colour, marker="o", markersize=3, linewidth=1.1, clip_on=False)
            plot.fill_between(centres, values, color=colour, alpha=0.1, linewidth=0)
            plot.set(xlim=(0, grid_w), ylim=(0, max(*values, 1) * 1.35), xticks=[], yticks=[])
            plot.spines[["left", "right", "top"]].set_visible(False)
            plot.spines["bottom"].set(color="#c9ced4", linewidth=0.6)
            for c, (value, text) in enumerate(points):
                rise = (PANEL - 110) * value / (max(*values, 1) * 1.35)
                write(left + centres[c], low - rise - 14, text, 24, cell_w, ha="center", va="baseline", color=INK)
                write(left + centres[c], low + 10, columns[c], 24, cell_w, ha="center", va="top", color=GREY)
        figure.savefig(path, format="png", dpi=DPI)
