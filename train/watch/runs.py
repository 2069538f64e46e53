"""The list of runs, and what a run's page shows beside its curves."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from infer.adapter.read import FILE
from infer.program.run_names import FOLDERS
from train.state.checkpoint_names import checkpoint_steps
from train.state.latest import NAME as LATEST
from train.state.run_lock import NAME as LOCK
from train.sweeps.point import RECORD
from train.trackers.metrics import read_events
from train.watch.places import run_folder, run_place, runs_folder
from train.watch.states import CONFIG, METRICS, MOST, read_json, state_of

DEPTH = 3  # folders within runs/ that a run's name may have
EVENTS = 500  # of the latest that are shown
REPORTS = {"sweep": "report.html", "comparison": "compare/report.html", "precision gap": "gap/report.html"}
MARKS = {CONFIG, METRICS, LATEST, RECORD}
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TOLD_BY = {CONFIG, METRICS, LATEST, LOCK, "adapter", "previews"}
"""What a run's state is read from; of a folder the time changes with the files in it."""

Report = dict[str, str]
Facts = dict[str, tuple[int, int]]
_known: dict[str, tuple[Facts, dict[str, Any]]] = {}
"""States that were read already, by run."""


def run_names(reports: list[Report]) -> Iterator[tuple[str, float, Facts]]:
    """Every run's name, when it last changed, and the times and sizes of what tells its state.

    reports: is given the folders that are no runs and hold a report, of a sweep over its runs or of a comparison.
    """
    yield from _names(runs_folder(), "", DEPTH, reports)


def _names(folder: Path, before: str, depth: int, reports: list[Report]) -> Iterator[tuple[str, float, Facts]]:
    try:
        entries = [each for each in os.scandir(folder) if each.is_dir(follow_symlinks=False)]
    except OSError:  # gone meanwhile
        return
    for entry in entries:
        name = entry.name
        if name.startswith(".") or (name == "cache" and not before) or (before and name in FOLDERS):
            continue
        path = Path(entry.path)
        try:
            inside = list(os.scandir(path))
            there = {each.name for each in inside}
            if there & MARKS:
                facts = {each.name: each.stat() for each in inside if each.name in TOLD_BY}
                changed = facts[METRICS].st_mtime if METRICS in facts else entry.stat().st_mtime
                yield before + name, changed, {what: (s.st_mtime_ns, s.st_size) for what, s in facts.items()}
        except OSError:
            continue
        if not there & MARKS:
            kinds = (kind for kind, file in REPORTS.items() if file.split("/")[0] in there and (path / file).is_file())
            reports += [{"name": before + name, "kind": kind} for kind in kinds]
        if depth > 1 and (not there & MARKS or RECORD not in there):
            yield from _names(path, f"{before}{name}/", depth - 1, reports)


def last_preview(folder: Path) -> str | None:
    sheets = preview_steps(folder)
    return f"previews/step-{sheets[-1]:06d}.png" if sheets else None


def preview_steps(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder / "previews")  # noqa: PTH208  (1,000 runs: no Path for each)
    except OSError:
        return []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d{6,9})\.png", name)))


def list_runs() -> tuple[list[dict[str, Any]], list[Report]]:
    """All runs with their states, those that changed last first; and the reports that belong to none of them."""
    found, reports = [], list[Report]()
    for name, changed, facts in sorted(run_names(reports), key=lambda each: -each[1]):
        folder = runs_folder() / name
        before, entry = _known.get(str(folder.absolute()), ({}, {}))
        if before != facts or facts.get(LOCK, (0, 0))[1]:  # somebody holds it: whether he lives is no file's matter
            entry = {"name": name, "changed": changed, "preview": last_preview(folder), **state_of(folder)}
            _known[str(folder.absolute())] = facts, entry
        found.append(entry)
    return found, sorted(reports, key=lambda each: each["name"])


def read_config(folder: Path) -> dict[str, Any]:
    """The recorded settings; empty if they are absent, torn or no settings."""
    try:
        with (folder / CONFIG).open("rb") as stream:
            loader = LOADER(stream.read(MOST))
        try:
            said = loader.get_single_data()
        finally:
            loader.dispose()
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def flat(values: Any, before: str = "") -> dict[str, str]:
    """Settings by dotted name, each as one line of text."""
    if isinstance(values, dict) and values:
        found: dict[str, str] = {}
        for key, value in values.items():
            found |= flat(value, f"{before}.{key}" if before else str(key))
        return found
    return {before: json.dumps(values, ensure_ascii=False, default=str)}


def difference(name: str, other: str) -> list[dict[str, str | None]]:
    """The settings of two runs that differ; None where one has no such setting."""
    one, two = (flat(read_config(run_folder(each))) for each in (name, other))
    return [
        {"name": key, "one": one.get(key), "other": two.get(key)}
        for key in sorted({*one, *two} - {"run"})
        if one.get(key) != two.get(key)
    ]


def describe(name: str, begun: str | None = None) -> dict[str, Any]:
    """What a run's page shows; begun: the state of a job that trains it, and whose folder may not be there yet."""
    folder = run_place(name) if begun else run_folder(name)
    latest, config = read_json(folder / LATEST), read_config(folder)
    plan = read_json(folder / "plan.json")
    events = [
        {key: event.get(key) for key in ("step", "event", "loss", "threshold", "gradient_norm", "samples")}
        for event in read_events(folder / "events.jsonl")[-EVENTS:]
    ]
    files = ("report.html", "compare/report.html", "gap/report.html", "data.html", "compare/comparison.png", "loss.png")
    choice = read_json(folder / "choose" / "choice.json")
    state = state_of(folder)
    if begun == "waiting" or (begun == "running" and state["state"] not in ("training", "encoding")):
        state |= {"state": "waiting" if begun == "waiting" else "encoding", "reason": None}
    return {
        "name": name,
        **state,
        "settings": flat(config) if config else {},
        "words": latest.get("words"),
        "ranks": latest.get("ranks"),
        "previews": preview_steps(folder),
        "checkpoints": checkpoint_steps(folder / "checkpoints"),
        "adapter": (folder / "adapter" / FILE).is_file(),
        "averaged": (folder / "adapter-ema" / FILE).is_file(),
        "chosen": read_json(folder / "chosen" / "choice.json") or None,
        "events": events,
        "files": [each for each in files if (folder / each).is_file()],
        "drawings": drawings(folder),
        "choice": choice or None,
        "plan": {key: plan[key] for key in ("peak_memory_bytes", "parts", "text_phase_bytes") if key in plan} or None,
        "data": config.get("data", {}).get("path") if isinstance(config.get("data"), dict) else None,
        "trigger": config.get("data", {}).get("trigger") if isinstance(config.get("data"), dict) else None,
        "config_broken": bool(not config and (folder / CONFIG).exists()),
        "now": time.time(),
    }


def drawings(folder: Path) -> list[dict[str, Any]]:
    """What was drawn with the run by the page, the latest first: each folder's pictures."""
    found = []
    for each in sorted((folder / "drawn").glob("*"), reverse=True):
        if re.fullmatch(r"\d{1,6}", each.name) and each.is_dir():
            names = sorted(file.name for file in each.glob("*.png"))
            found.append({"name": f"drawn/{each.name}", "pictures": names})
    return found


def picture_losses(name: str) -> list[dict[str, Any]]:
    """How the loss of each training picture stands, those that stand out most first."""
    said = read_json_large(run_place(name) / "pictures.json")
    found = []
    pictures = said.get("pictures")
    for picture, values in pictures.items() if isinstance(pictures, dict) else ():
        try:
            visits, relative, left = (float(value) for value in values)
        except (TypeError, ValueError):
            continue
        found.append({"name": picture, "visits": int(visits), "relative": relative, "left": left})
    return sorted(found, key=lambda each: -each["relative"])


def read_json_large(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
