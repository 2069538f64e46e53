"""Rows of what was checked, and the table of them for people."""

import sys
from pathlib import Path
from typing import TextIO

from scripts import bench_rows
from scripts.bench_rows import Row
from scripts.check.figures import share


def row_of(line: Row) -> Row:
    """What is recorded of a row: the worst of its figures as a part of its limit."""
    more: Row = (
        {"figures": line["figures"], "seconds": round(line["seconds"], 1)}
        if "figures" in line
        else {"error": line["error"]}
    )
    worst = max((share(*figure) for figure in line["figures"].values()), default=0.0) if "figures" in line else None
    return bench_rows.make_row(f"gpu {line['variant']}", "of its limit", worst, "<= 1", line, **more)


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        name = row["name"].removeprefix("gpu ")
        if row["measured"] is None:
            lines.append(f"{name:24} FAILED    {row['error'].splitlines()[0][:200]}")
            continue
        said = ", ".join(
            f"{key} {value:.3g} ({sign} {limit:g})" for key, (value, sign, limit) in row["figures"].items()
        )
        verdict = "ok     " if row["measured"] <= 1 else "DIFFERS"
        lines.append(f"{name:24} {verdict} {row['seconds']:5.0f} s  {said}")
    return "\n".join(lines)


def tell(name: str, seen: Path, where: TextIO = sys.stdout) -> None:
    """Print a row that is done."""
    line = next(line for line in reversed(bench_rows.read_lines(seen)) if line["variant"] == name)
    print(table([row_of(line)]), file=where, flush=True)
