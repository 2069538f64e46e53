"""The figure of a sensitivity: the error of each block's layers as a heat map."""

import re
from pathlib import Path
from typing import Any

from infer.report.plot import Heat
from infer.report.png import save_log_heat
from infer.report.results import Estimate

LEAST = 1e-6  # percent: a logarithmic scale has no 0


def draw_heat(groups: list[dict[str, Any]], path: Path) -> None:
    """A PNG with a column for each block and a row for each group of layers that read one input: the velocity's error
    in percent when that group alone is NF4. Layers outside blocks have the column `other`."""
    cells: dict[tuple[str, str], Estimate] = {}
    for group in groups:
        first = group["layers"][0]
        match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)", first)
        column = "other" if match is None else f"{'s' if match[1] else 'd'}{match[2]}"
        row = first if match is None else f"{'single' if match[1] else 'double'} {match[3]}"
        cells[row, column] = Estimate(max(100 * group["errors"]["nf4"] ** 0.5, LEAST))
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    values = [[cells.get((row, column)) for column in columns] for row in rows]
    save_log_heat(path, Heat("error of the velocity when these layers alone are NF4, %", rows, columns, values))
