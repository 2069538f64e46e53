"""A comparison's report: its rows become results.json, comparison.png, report.md and report.html in one folder.

A comparison is worth what people and programs can read off it: the JSON holds every figure that was measured, the
page opens offline and puts any two pictures side by side. The pictures themselves are in the folder already.

    python -m infer.report runs/compare/compare    # writes the report again from its results.json
"""

import html
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from infer.atomic import replace_file
from infer.errors import explained
from infer.figure import draw
from infer.page import Cell, render

Row = dict[str, Any]
Grid = list[tuple[str, list[Row | None]]]  # for each adapter its name and, for each precision, a picture or None


def write(result: Row, folder: Path) -> None:
    """Writes the four files of a report, each whole or not at all; results.json comes last and says that all are there.

    Args:
        result: `model`, `device`, `versions`, `sampling` and `rows`; a score that is not defined is None, never NaN.
        folder: holds the pictures, at each row's `image`.

    Raises:
        ValueError: there are no rows, a row's picture is absent, or a number is NaN or infinite.
    """
    rows = result["rows"]
    if not rows:
        raise ValueError("A report needs rows and got none: choose at least one precision, prompt and seed.")
    for i, row in enumerate(rows):
        if not (folder / row["image"]).is_file():
            name = f"{row['precision']}, {_variant(row['adapter'])}, seed {row['seed']}"
            raise ValueError(f"Row {i} ({name}) has no picture: {folder / row['image']} is absent. Generate it again.")
    # All text is made before the first file is touched: what is wrong with the input leaves an old report whole.
    try:
        data = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"a report's numbers must be finite ({error}); measure again") from error
    titles, cells = _columns(summarise(rows), _peak(result))
    content = (_heading(rows), _facts(result), titles, cells, by_memory(rows), _groups(rows, folder))
    page, text = render(*content), _markdown(*content)
    replace_file(folder / "comparison.png", lambda path: figure(result, folder, path))
    replace_file(folder / "report.md", lambda path: path.write_bytes(text.encode()))
    replace_file(folder / "report.html", lambda path: path.write_bytes(page.encode()))
    replace_file(folder / "results.json", lambda path: path.write_bytes(data.encode()))


def summarise(rows: list[Row]) -> list[Row]:
    """One entry a (precision, adapter), in order of first appearance: means over its pictures, highest peak memory.

    A score's mean is over the pictures where it is defined, and None where it is defined for none.
    """
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["adapter"]), []).append(row)
    return [
        {
            "precision": precision,
            "adapter": adapter,
            "images": len(group),
            "weights_bytes": max(row["weights_bytes"] for row in group),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in group),
            "load_seconds": fmean(row["stages"]["load"]["seconds"] for row in group),
            "seconds": fmean(row["seconds"] for row in group),
            "seconds_per_step": fmean(row["seconds_per_step"] for row in group),
            "scores": {
                key: _mean(row["scores"].get(key) for row in group)
                for key in dict.fromkeys(key for row in group for key in row["scores"])
            },
        }
        for (precision, adapter), group in groups.items()
    ]


def table(summary: list[Row]) -> str:
    """The summary as aligned plain text for the terminal."""
    titles, cells = _columns(summary, "peak memory")
    lines = [titles, *([text for text, _, _ in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def by_memory(rows: list[Row]) -> list[str]:
    """The precisions from the most memory to the least, then in order of appearance."""
    most: dict[str, int] = {}
    for row in rows:
        most[row["precision"]] = max(most.get(row["precision"], 0), _memory(row))
    return sorted(most, key=lambda precision: most[precision], reverse=True)


def _memory(row: Row) -> int:
    """The bytes that tell a row's precision from others: on CUDA its peak; on a CPU the weights, since the resident set
    still holds what the process freed after the precisions before."""
    measured: int = row["peak_memory_bytes" if "peak_reserved_bytes" in row["stages"]["load"] else "weights_bytes"]
    return measured


def figure(result: Row, folder: Path, path: Path) -> None:
    """Draws the first prompt and seed at every precision, with the memory each precision takes, as a PNG at `path`."""
    rows = result["rows"]
    columns = by_memory(rows)

    def curve(key: str) -> list[tuple[int, str]]:
        peaks = [max(row[key] for row in rows if row["precision"] == precision) for precision in columns]
        return [(peak, _size(peak)) for peak in peaks]

    curves = [(_peak(result), curve("peak_memory_bytes")), ("weights", curve("weights_bytes"))]
    prompt, [(_, grid), *_] = _groups(rows, folder)[0]
    draw(path, prompt, columns, grid, curves)


def _markdown(
    heading: str,
    facts: dict[str, str],
    titles: list[str],
    cells: list[list[Cell]],
    columns: list[str],
    groups: list[tuple[str, list[tuple[int, Grid]]]],
) -> str:
    """The same content as `infer.page.render` makes a page of, as Markdown."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    lines = [f"# {_escape(heading)}", ""]
    lines += [f"- **{name}**: {_escape(value)}" for name, value in facts.items()]
    lines += ["", line(map(_escape, titles)), line(["---", "---"] + ["---:"] * (len(titles) - 2))]
    lines += [line(_escape(text) for text, _, _ in row) for row in cells]
    lines += ["", "![The first prompt at each precision, and the memory it takes](comparison.png)"]
    for number, (prompt, seeds) in enumerate(groups, start=1):
        # The quotation marks keep a prompt such as "- a" or "1. a" from becoming a list.
        lines += ["", f"## Prompt {number}", "", f"“{_escape(prompt)}”"]
        for seed, grid in seeds:
            lines += ["", f"### Seed {_escape(str(seed))}", "", line([" ", *map(_escape, columns)])]
            lines.append(line(["---"] * (len(columns) + 1)))
            for variant, pictures in grid:
                shown = (p and f"![{_escape(p['name'])}]({p['link']})<br>{p['caption']}" for p in pictures)
                lines.append(line([_escape(variant), *(cell or " " for cell in shown)]))
    return "\n".join(lines) + "\n"


def _groups(rows: list[Row], folder: Path) -> list[tuple[str, list[tuple[int, Grid]]]]:
    """For each prompt its seeds, and for each of these the pictures, precisions ordered by memory."""
    # Rows that agree in all four hold the same picture (a prompt listed twice, say): one of them is shown.
    cells = {(row["prompt"], row["seed"], row["adapter"], row["precision"]): _picture(row, folder) for row in rows}
    adapters, columns = list(dict.fromkeys(row["adapter"] for row in rows)), by_memory(rows)
    groups: dict[str, dict[int, Grid]] = {}
    for row in rows:
        prompt, seed = row["prompt"], row["seed"]
        groups.setdefault(prompt, {})[seed] = [
            (_variant(adapter), [cells.get((prompt, seed, adapter, precision)) for precision in columns])
            for adapter in adapters
        ]
    return [(prompt, list(seeds.items())) for prompt, seeds in groups.items()]


def _picture(row: Row, folder: Path) -> Row:
    return {
        "file": folder / row["image"],
        "link": quote(row["image"]),
        "name": f"{row['precision']}, {_variant(row['adapter'])}",
        "caption": f"{_size(_memory(row))} · {_number(row['seconds'])} s",
        "scores": ", ".join(f"{key} {_number(value)}" for key, value in row["scores"].items() if value is not None),
        "reference": row["precision"] == "bf16",
    }


def _columns(summary: list[Row], peak: str) -> tuple[list[str], list[list[Cell]]]:
    """Titles and cells of the summary table; `peak` names the column of peak memory."""
    keys = list(dict.fromkeys(key for entry in summary for key in entry["scores"]))
    largest = {key: max(entry[key] for entry in summary) or 1 for key in ("weights_bytes", "peak_memory_bytes")}
    titles = ["precision", "adapter", "weights", peak, "load s", "s/image", "s/step", *keys]
    cells: list[list[Cell]] = []
    for entry in summary:
        names: list[Cell] = [(text, text, None) for text in (entry["precision"], entry["adapter"] or "none")]
        sizes: list[Cell] = [(_size(entry[key]), entry[key], entry[key] / top) for key, top in largest.items()]
        numbers = [entry["load_seconds"], entry["seconds"], entry["seconds_per_step"]]
        numbers += [entry["scores"].get(key) for key in keys]
        cells.append([*names, *sizes, *((_number(number), number, None) for number in numbers)])
    return titles, cells


def _heading(rows: list[Row]) -> str:
    return "Comparison of " + ", ".join(dict.fromkeys(row["precision"] for row in rows))


def _facts(result: Row) -> dict[str, str]:
    names = ("versions", "sampling")
    pairs = {name: ", ".join(f"{key} {value}" for key, value in result[name].items()) for name in names}
    return {"model": result["model"], "device": result["device"], **pairs}


def _peak(result: Row) -> str:
    """What peak memory means here: there is no allocator to ask on a CPU, only the process's size."""
    return "peak resident set" if result["device"].startswith("cpu") else "peak allocated"


def _variant(adapter: str | None) -> str:
    return "without adapter" if adapter is None else f"with {adapter}"


def _size(count: int) -> str:
    value, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{value:.{0 if value >= 100 else 2}f} {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{next(digits for digits, above in enumerate((1000, 100, 10, 0.1, 0)) if abs(value) >= above)}f}"


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None


def _escape(text: str) -> str:
    """Text as one line of Markdown that shows it as it is."""
    line = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#~$!" else c for c in line)


def rewrite(folder: Path) -> None:
    """Write the report of a comparison again from its results.json.

    Raises:
        ValueError: there is none, or it is not one that was written here.
    """
    file = folder / "results.json"
    try:
        comparison = json.loads(file.read_bytes())
        if not isinstance(comparison, dict) or not isinstance(comparison["rows"], list):
            raise TypeError("it is no object with rows")
        write(comparison, folder)
        print(table(summarise(comparison["rows"])))
    except (OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} holds no comparison that can be reported ({type(error).__name__}: {error}); give the folder that "
            "infer/compare.py wrote, or compare again"
        ) from error
    print(f"report: {folder / 'report.html'}")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("give one folder, as in python -m infer.report runs/compare/compare")
    rewrite(Path(arguments[0]))


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
