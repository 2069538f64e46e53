"""PNG files of plots, read back: colours where values are, limits as whiskers, cells of heat maps."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from infer.report.plot import COLOURS, Heat, Lines, Series
from infer.report.png import save_heats, save_lines, save_log_heat
from infer.report.results import Estimate


def where(file: Path, colour: str) -> np.ndarray:
    """Rows and columns of the pixels of a colour, [n, 2]."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    return np.argwhere(np.abs(pixels - ImageColor.getrgb(colour)).max(-1) <= 2)


def test_lines_and_whiskers(tmp_path: Path) -> None:
    low = Series("low", [Estimate(1, 0.5, 1.5), None, Estimate(1, 0.5, 1.5)], 0)
    high = Series("high", [Estimate(9), Estimate(9), Estimate(9)], 1, dashed=True)
    save_lines(tmp_path / "a.png", [Lines("t", [0.0, 0.5, 1.0], [low, high])], "x")
    first, second = (where(tmp_path / "a.png", COLOURS[i][0]) for i in (0, 1))
    assert len(first) > 100 and len(second) > 100
    assert np.median(second[:, 0]) < np.median(first[:, 0])  # higher values stand higher
    # the whiskers make the first series taller than a line of the second is thick
    columns = {column: np.ptp(first[first[:, 1] == column][:, 0]) for column in np.unique(first[:, 1])}
    assert max(columns.values()) > 20


def test_heats_shade_their_cells(tmp_path: Path) -> None:
    values = [[Estimate(0.0, -1.0, 1.0), Estimate(4.0, 3.0, 5.0)], [Estimate(-4.0, -5.0, -3.0), Estimate(0.0)]]
    heat = Heat("t", ["a", "b"], ["a", "b"], values, "run at", "trained at")
    save_heats(tmp_path / "a.png", [heat, heat], signed={1})
    # RdBu_r at its two ends: below 0 blue, above 0 red; viridis at its two ends
    blue, red = (where(tmp_path / "a.png", colour) for colour in ("#053061", "#67001f"))
    dark, light = (where(tmp_path / "a.png", colour) for colour in ("#440154", "#fde725"))
    assert min(map(len, (blue, red, dark, light))) > 1000
    assert blue[:, 0].mean() > red[:, 0].mean() and blue[:, 1].mean() < red[:, 1].mean()
    assert dark[:, 1].mean() < blue[:, 1].mean() and light[:, 1].mean() < red[:, 1].mean()  # the left of the two


def test_a_large_heat_leaves_unknown_cells_empty(tmp_path: Path) -> None:
    heat = Heat("t", ["a", "b"], ["x", "y"], [[Estimate(1e-6), None], [None, Estimate(100.0)]])
    save_log_heat(tmp_path / "a.png", heat)
    known = [where(tmp_path / "a.png", colour) for colour in ("#440154", "#fde725")]
    assert all(len(cells) > 1000 for cells in known)
    width = Image.open(tmp_path / "a.png").width
    cells = known[0][known[0][:, 1] < 0.45 * width]
    assert len(cells) > 1000 and np.ptp(cells[:, 0]) < 0.6 * np.ptp(where(tmp_path / "a.png", "#ffffff")[:, 0])
