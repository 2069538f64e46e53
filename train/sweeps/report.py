"""A sweep's report: a table, a page with the Pareto front, curves and pictures, and the best point as a config.

    python train/sweep_report.py runs/mine

writes report.html, results.json and experiment/best.yaml to the sweep's folder, while it runs or after; the sweep
itself does so at its end. `python train/train.py --config-dir runs/mine experiment=best run=again` trains the best
point anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import yaml

from infer.program.atomic import replace_file
from infer.report.cells import number, plain, size, text_cell, text_table
from infer.report.gallery import Grid, Group, Picture, embed, gallery, viewer
from infer.report.page import Cell, asset, contents, document, facts_list, table
from infer.report.plot import STYLE, Lines, series
from infer.report.results import Estimate, Row, from_json, read_results
from infer.report.svg import draw_lines
from train.sweeps.pareto import draw_front, front_of
from train.sweeps.point import RECORD
from train.trackers.metrics import read_events

BINS = 40  # x values of a loss curve, each the mean of its steps
NOT_TRAINED = ("run", "sweep", "track", "device")  # of a point's settings, not of what it trains
UNITS = {"seconds": "s", "image_seconds": "s", "seconds_per_step": "s", "memory_gib": "GiB", "image_memory_gib": "GiB"}
LIST_STYLE = (
    ".list th, .list td { padding: .45rem .75rem; text-align: left; font-size: .875rem; overflow-wrap: anywhere; }\n"
)


@dataclass
class Point:
    """A point of a sweep, as its record (train/sweeps/point.py) says."""

    name: str
    values: dict[str, str]
    """The settings that vary, as they were given."""
    config: dict[str, Any]
    stages: dict[str, Any]
    state: str | None = None
    """running, stopped, failed or done."""
    error: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    front: bool | None = None
    """Whether no other point beats it; None unless it is done."""

    @property
    def objectives(self) -> dict[str, str]:
        """The figures that count, and whether each is to minimize or to maximize."""
        objectives: dict[str, str] = self.config["sweep"]["objectives"]
        return objectives


def read_points(sweep: Path) -> list[Point]:
    """The points of a sweep, in the order of their names.

    Raises:
        ValueError: there are none.
    """
    files = sorted(sweep.glob(f"*/{RECORD}"))
    points = [from_json(Point, json.loads(file.read_text()), str(file)) for file in files]
    if not points:
        raise ValueError(f"{sweep} holds no points; give the folder of a sweep, runs/<run>")
    objectives = points[-1].objectives
    for point in points:
        lacking = [name for name in objectives if name not in point.figures]
        if point.state == "done" and lacking:  # it was made when other objectives counted
            point.state, point.error = "failed", f"it has no {', '.join(lacking)}"
    done = [point for point in points if point.state == "done"]
    values = [[point.figures[name] for name in objectives] for point in done]
    for point, front in zip(done, front_of(values, list(objectives.values())), strict=True):
        point.front = front
    return points


def best_of(points: Sequence[Point]) -> Point | None:
    """The done point that is best in the first objective; of several the first."""
    done = [point for point in points if point.state == "done"]
    name, direction = next(iter(points[-1].objectives.items()))
    sign = 1 if direction == "minimize" else -1
    return min(done, key=lambda point: sign * point.figures[name], default=None)


def best_config(point: Point) -> str:
    """A point's settings as an experiment: what is trained, without the run's name, tracker and device."""
    config = {key: value for key, value in point.config.items() if key not in NOT_TRAINED}

    def literal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: literal(item) for key, item in value.items()}
        if isinstance(value, list):
            return [literal(item) for item in value]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    figures = ", ".join(f"{name} {value:.6g}" for name, value in point.figures.items())
    sweep = point.config["run"]
    return (
        f"# @package _global_\n# the best point of runs/{sweep}, {point.name}: {figures}\n"
        f"#   python train/train.py --config-dir runs/{sweep} experiment=best run=again\n"
        f"{yaml.safe_dump(literal(config), sort_keys=False, allow_unicode=True)}"
    )


def point_cells(points: Sequence[Point]) -> tuple[list[str], list[list[Cell]], int]:
    """Titles, cells, and how many of the first columns hold text."""
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    names = list(dict.fromkeys([*points[-1].objectives, *(name for point in points for name in point.figures)]))
    titles = ["point", "state", *keys, *(f"{name}, {UNITS[name]}" if name in UNITS else name for name in names)]
    cells: list[list[Cell]] = []
    for point in points:
        state = "front" if point.front else str(point.state)
        words = [point.name, state, *(point.values.get(key, "") for key in keys)]
        figures = [point.figures.get(name) for name in names]
        cells.append([*map(text_cell, words), *((number(figure), figure, None) for figure in figures)])
    return titles, cells, 2 + len(keys)


def points_text(points: Sequence[Point]) -> str:
    """The table for the terminal: a point, its objectives, and whether it is on the front."""
    titles, cells, texts = point_cells(points)
    kept = [0, 1, *range(texts, texts + len(points[-1].objectives))]
    return text_table([[line[i] for i in kept] for line in (titles, *(list(map(plain, line)) for line in cells))])


def curves(points: Sequence[Point], sweep: Path) -> str:
    """Training and validation loss of all points, each on one axis of steps."""
    events = {point.name: read_events(sweep / point.name / "metrics.jsonl") for point in points}
    drawn = []
    for title, key in (("Validation loss", "validation_loss"), ("Loss, smoothed", "loss")):
        found = {name: {int(e["step"]): e[key] for e in run if key in e} for name, run in events.items()}
        last = max((step for curve in found.values() for step in curve), default=0)
        width = max(1, -(-last // BINS)) if key == "loss" else 1
        binned: dict[str, dict[int, list[float]]] = {}
        for name, curve in found.items():
            for step, value in curve.items():
                binned.setdefault(name, {}).setdefault(-(-step // width) * width, []).append(value)
        steps = sorted({step for curve in binned.values() for step in curve})
        lines = [
            (name, [Estimate(fmean(curve[step])) if step in curve else None for step in steps])
            for name, curve in binned.items()
        ]
        note = f"means of {width} steps" if width > 1 else ""
        drawn.append(draw_lines(Lines(title, steps, series(lines), note=note)))
    return f'<div class="charts wide">{"".join(drawn)}</div>' if any(drawn) else ""


def pictures(points: Sequence[Point], sweep: Path) -> str:
    """Pictures of every point for the same prompts and seeds, without and with its adapter."""
    found: dict[str, dict[int, dict[str, dict[str, Picture]]]] = {}
    names = []
    for point in points:
        file = sweep / point.name / "compare" / "results.json"
        if "compare" not in point.stages or not file.is_file():
            continue
        names.append(point.name)
        for row in read_results(file).rows:
            line = "with the adapter" if row.adapter else "without adapter"
            picture = _picture(row, point.name, line, file.parent)
            found.setdefault(row.asked, {}).setdefault(row.seed, {}).setdefault(line, {})[point.name] = picture
    if not names:
        return ""

    def grid(lines: dict[str, dict[str, Picture]]) -> Grid:
        return [(line, [by_name.get(name) for name in names]) for line, by_name in lines.items()]

    groups: list[Group] = [(p, [(seed, grid(lines)) for seed, lines in seeds.items()]) for p, seeds in found.items()]
    all_lines = (by_name for seeds in found.values() for lines in seeds.values() for by_name in lines.values())
    return gallery(names, groups, embed(picture.file for by_name in all_lines for picture in by_name.values()))


def _picture(row: Row, name: str, line: str, folder: Path) -> Picture:
    return Picture(
        file=folder / row.image,
        link=quote(f"{name}/compare/{row.image}"),
        name=f"{name}, {line}",
        short=name,
        line=line,
        caption=f"{size(row.peak_memory_bytes)} · {number(row.seconds)} s",
        scores=", ".join(f"{key} {number(value)}" for key, value in row.scores.items() if value is not None),
        reference=not row.adapter,
    )


def render(points: Sequence[Point], sweep: Path) -> str:
    """The whole page."""
    config, objectives = points[-1].config, points[-1].objectives
    done = [point for point in points if point.state == "done"]
    failed = [point for point in points if point.state == "failed"]
    first, *others = objectives
    best = best_of(points)
    states = {"done": len(done), "failed": len(failed), "open": len(points) - len(done) - len(failed)}
    facts = {
        "points": f"{len(points)}: {', '.join(f'{count} {state}' for state, count in states.items())}",
        "model": config["model"]["path"],
        "data": config["data"]["path"] or ", ".join(source["path"] for source in config["data"]["sources"]),
        "steps": str(config["steps"]),
        "objectives": ", ".join(f"{direction} {name}" for name, direction in objectives.items()),
    }
    if best is not None:
        facts["best"] = f"{best.name} ({first} {number(best.figures[first])})"
        facts["again"] = f"python train/train.py --config-dir {sweep} experiment=best run=again"
    drawings = ""
    for other in others if done else ():
        drawings += draw_front(
            (other, first),
            (objectives[other], objectives[first]),
            [point.name for point in done],
            [(point.figures[other], point.figures[first]) for point in done],
            [bool(point.front) for point in done],
        )
    titles, cells, texts = point_cells(points)
    broken = "".join(
        f'<tr><th scope="row">{escape(point.name)}</th><td>{escape(str(point.error))}</td></tr>' for point in failed
    )
    hint = "<p>On the front: no other point is at least as good in every objective and better in one.</p>"
    legend = "<p>Filled: on the front. Joined: what nothing beats in the two objectives that are drawn.</p>"
    sections = [
        ("points", "Points", table(titles, cells, range(texts)) + hint),
        ("front", "Front", f'<div class="charts">{drawings}</div>{legend}' if drawings else ""),
        ("failed", "Failed", f'<div class="scroll"><table class="list">{broken}</table></div>' if broken else ""),
        ("curves", "Curves", curves(points, sweep)),
        ("pictures", "Pictures", pictures(points, sweep)),
    ]
    sections = [section for section in sections if section[2]]
    return document(
        f"Sweep {config['run']}",
        [facts_list(facts), contents([(name, title) for name, title, _ in sections])]
        + [f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in sections],
        asset("report.css") + STYLE + LIST_STYLE,
        asset("report.js"),
        viewer(),
        " 'self' file:",
    )


def write(sweep: Path) -> list[Point]:
    """Write the report of the points that there are; returns them."""
    points = read_points(sweep)
    page, best = render(points, sweep), best_of(points)
    told = [
        {key: getattr(point, key) for key in ("name", "state", "error", "values", "figures", "front")}
        for point in points
    ]
    replace_file(sweep / "results.json", lambda path: path.write_text(json.dumps(told, indent=1)))
    replace_file(sweep / "report.html", lambda path: path.write_bytes(page.encode()))
    if best is not None:
        text = best_config(best)
        replace_file(sweep / "experiment" / "best.yaml", lambda path: path.write_bytes(text.encode()))
    return points


def conclude(sweep: Path) -> None:
    """Write the report and say where it is.

    Raises:
        ValueError: a point failed.
    """
    points = write(sweep)
    best = best_of(points)
    print(f"\n{points_text(points)}")
    if best is not None:
        print(f"best: {best.name}, {sweep / 'experiment' / 'best.yaml'}")
    print(f"report: {sweep / 'report.html'}")
    failed = [f"{point.name}: {point.error}" for point in points if point.state == "failed"]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(points)} points failed ({'; '.join(failed[:5])}{'; ...' if failed[5:] else ''}); "
            "the same command again tries them again"
        )
