"""A sweep's report: a table, a page with the Pareto front, curves and pictures, and the best point as a config.

    python train/sweep_report.py runs/mine

writes report.html, results.json and experiment/best.yaml to the sweep's folder, while it runs or after; the sweep
itself does so at its end. `python train/train.py --config-dir runs/mine experiment=best run=again` trains the best
point anew.
"""

import json
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import yaml

from infer.program.atomic import replace_file
from infer.report.cells import Estimate, aligned, number, plain, size
from infer.report.chart import chart
from infer.report.gallery import Grid, Group, embed, gallery, viewer
from infer.report.page import Cell, asset, contents, document, facts_list, table
from train.sweeps.pareto import STYLE, front_of, scatter
from train.sweeps.point import RECORD
from train.trackers.figures import read_metrics

BINS = 40  # places of a loss curve, each the mean of its steps
OWN = ("run", "sweep", "track", "device")  # of a point's settings, not of what it trains
UNITS = {"seconds": "s", "image_seconds": "s", "seconds_per_step": "s", "memory_gib": "GiB", "image_memory_gib": "GiB"}


def read_points(sweep: Path) -> list[dict[str, Any]]:
    """The records of a sweep's points, by the time when they ended, with `front` for those that are done.

    Raises:
        ValueError: there are none.
    """
    points = [json.loads(file.read_text()) for file in sorted(sweep.glob(f"*/{RECORD}"))]
    if not points:
        raise ValueError(f"{sweep} holds no points; give the folder of a sweep, runs/<run>")
    objectives = points[-1]["config"]["sweep"]["objectives"]
    for point in points:
        point["figures"] = point.get("figures", {})
        lacking = [name for name in objectives if name not in point["figures"]]
        if point["state"] == "done" and lacking:  # it was made when other objectives counted
            point |= {"state": "failed", "error": f"it has no {', '.join(lacking)}"}
    done = [point for point in points if point["state"] == "done"]
    values = [[point["figures"][name] for name in objectives] for point in done]
    for point, front in zip(done, front_of(values, list(objectives.values())), strict=True):
        point["front"] = front
    return points


def best_of(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The done point that is best in the first objective; of several the first."""
    done = [point for point in points if point["state"] == "done"]
    name, direction = next(iter(points[-1]["config"]["sweep"]["objectives"].items()))
    sign = 1 if direction == "minimize" else -1
    return min(done, key=lambda point: sign * point["figures"][name], default=None)


def best_config(point: dict[str, Any]) -> str:
    """A point's settings as an experiment: what is trained, without the run's name, tracker and device."""
    config = {key: value for key, value in point["config"].items() if key not in OWN}

    def literal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: literal(item) for key, item in value.items()}
        if isinstance(value, list):
            return [literal(item) for item in value]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    figures = ", ".join(f"{name} {value:.6g}" for name, value in point["figures"].items())
    sweep = point["config"]["run"]
    return (
        f"# @package _global_\n# the best point of runs/{sweep}, {point['name']}: {figures}\n"
        f"#   python train/train.py --config-dir runs/{sweep} experiment=best run=again\n"
        f"{yaml.safe_dump(literal(config), sort_keys=False, allow_unicode=True)}"
    )


def columns(points: list[dict[str, Any]]) -> tuple[list[str], list[list[Cell]], int]:
    """Titles, cells, and how many of the first columns hold text."""
    keys = list(dict.fromkeys(key for point in points for key in point["values"]))
    objectives = points[-1]["config"]["sweep"]["objectives"]
    names = list(dict.fromkeys([*objectives, *(name for point in points for name in point["figures"])]))
    titles = ["point", "state", *keys, *(f"{name}, {UNITS[name]}" if name in UNITS else name for name in names)]
    cells: list[list[Cell]] = []
    for point in points:
        state = "front" if point.get("front") else point["state"]
        words = [point["name"], state, *(point["values"].get(key, "") for key in keys)]
        figures = [point["figures"].get(name) for name in names]
        cells.append([*((word, word, None) for word in words), *((number(f), f, None) for f in figures)])
    return titles, cells, 2 + len(keys)


def table_text(points: list[dict[str, Any]]) -> str:
    """The table for the terminal: a point, its objectives, and whether it is on the front."""
    objectives = points[-1]["config"]["sweep"]["objectives"]
    titles, cells, texts = columns(points)
    kept = [0, 1, *range(texts, texts + len(objectives))]
    return aligned([[line[i] for i in kept] for line in (titles, *(list(map(plain, line)) for line in cells))])


def curves(points: list[dict[str, Any]], sweep: Path) -> str:
    """Training and validation loss of all points, each on one axis of steps."""
    events = {point["name"]: read_metrics(sweep / point["name"]) for point in points}
    drawn = []
    for title, key in (("Validation loss", "validation_loss"), ("Loss, smoothed", "loss")):
        found = {name: {int(e["step"]): e[key] for e in run if key in e} for name, run in events.items()}
        last = max((step for curve in found.values() for step in curve), default=0)
        width = max(1, -(-last // BINS)) if key == "loss" else 1
        binned: dict[str, dict[int, list[float]]] = {}
        for name, curve in found.items():
            for step, value in curve.items():
                binned.setdefault(name, {}).setdefault(-(-step // width) * width, []).append(value)
        places = sorted({step for curve in binned.values() for step in curve})
        lines = [
            (name, [Estimate(fmean(curve[step])) if step in curve else None for step in places])
            for name, curve in binned.items()
        ]
        note = f"means of {width} steps" if width > 1 else ""
        drawn.append(chart(title, places, lines, note=note))
    return f'<div class="charts wide">{"".join(drawn)}</div>' if any(drawn) else ""


def pictures(points: list[dict[str, Any]], sweep: Path) -> str:
    """Pictures of every point for the same prompts and seeds, without and with its adapter."""
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    names = []
    for point in points:
        file = sweep / point["name"] / "compare" / "results.json"
        if "compare" not in point["stages"] or not file.is_file():
            continue
        names.append(point["name"])
        for row in json.loads(file.read_text())["rows"]:
            line = "with the adapter" if row["adapter"] else "without adapter"
            cell = _picture(row, point["name"], line, file.parent)
            found.setdefault(row["prompt"], {}).setdefault(row["seed"], {}).setdefault(line, {})[point["name"]] = cell
    if not names:
        return ""

    def grid(lines: dict[str, dict[str, Any]]) -> Grid:
        return [(line, [cells.get(name) for name in names]) for line, cells in lines.items()]

    groups: list[Group] = [(p, [(seed, grid(lines)) for seed, lines in seeds.items()]) for p, seeds in found.items()]
    files = [c["file"] for _, s in groups for _, g in s for _, cells in g for c in cells if c is not None]
    return gallery(names, groups, embed(files))


def _picture(row: dict[str, Any], name: str, line: str, folder: Path) -> dict[str, Any]:
    scores = ", ".join(f"{key} {number(value)}" for key, value in row["scores"].items() if isinstance(value, float))
    return {
        "file": folder / row["image"],
        "link": quote(f"{name}/compare/{row['image']}"),
        "name": f"{name}, {line}",
        "short": name,
        "line": line,
        "caption": f"{size(row['peak_memory_bytes'])} · {number(row['seconds'])} s",
        "scores": scores,
        "reference": not row["adapter"],
    }


def render(points: list[dict[str, Any]], sweep: Path) -> str:
    """The whole page."""
    config = points[-1]["config"]
    objectives = config["sweep"]["objectives"]
    done = [point for point in points if point["state"] == "done"]
    failed = [(point["name"], point["error"]) for point in points if point["state"] == "failed"]
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
        facts["best"] = f"{best['name']} ({next(iter(objectives))} {number(best['figures'][next(iter(objectives))])})"
        facts["again"] = f"python train/train.py --config-dir {sweep} experiment=best run=again"
    first, *others = objectives
    drawings = ""
    if done:
        values = [point["figures"] for point in done]
        names, front = [point["name"] for point in done], [point["front"] for point in done]
        for other in others:
            two = (other, first), (objectives[other], objectives[first])
            drawings += scatter(*two, names, [(v[other], v[first]) for v in values], front)
    titles, cells, texts = columns(points)
    broken = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(error))}</td></tr>' for name, error in failed
    )
    hint = "<p>On the front: no other point is at least as good in every objective and better in one.</p>"
    lines = "<p>Filled: on the front. Joined: what nothing beats in the two objectives that are drawn.</p>"
    sections = [
        ("points", "Points", table(titles, cells, range(texts)) + hint),
        ("front", "Front", f'<div class="charts">{drawings}</div>{lines}' if drawings else ""),
        ("failed", "Failed", f'<div class="scroll"><table class="list">{broken}</table></div>' if broken else ""),
        ("curves", "Curves", curves(points, sweep)),
        ("pictures", "Pictures", pictures(points, sweep)),
    ]
    sections = [section for section in sections if section[2]]
    return document(
        f"Sweep {config['run']}",
        [facts_list(facts), contents([(name, title) for name, title, _ in sections])]
        + [f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in sections],
        asset("report.css") + STYLE,
        asset("report.js"),
        viewer(),
        " 'self' file:",
    )


def write(sweep: Path) -> list[dict[str, Any]]:
    """Write the report of the points that there are; returns them."""
    points = read_points(sweep)
    page, best = render(points, sweep), best_of(points)
    told = [
        {key: point.get(key) for key in ("name", "state", "error", "values", "figures", "front")} for point in points
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
    print(f"\n{table_text(points)}")
    if best is not None:
        print(f"best: {best['name']}, {sweep / 'experiment' / 'best.yaml'}")
    print(f"report: {sweep / 'report.html'}")
    failed = [f"{point['name']}: {point['error']}" for point in points if point["state"] == "failed"]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(points)} points failed ({'; '.join(failed[:5])}{'; ...' if failed[5:] else ''}); "
            "the same command again tries them again"
        )
