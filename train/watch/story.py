"""What a run's files say of its course, in order; also of one that was started in a terminal, where its words are."""

import time
from typing import Any

from train.state.checkpoint_names import checkpoint_steps
from train.state.latest import NAME as LATEST
from train.trackers.metrics import read_events
from train.watch.curves import curves
from train.watch.places import run_folder
from train.watch.runs import preview_steps
from train.watch.states import read_json, state_of

MOST = 1000  # lines


def story(name: str) -> list[str]:
    """Lines of text: its start, what happened at which step, and how it ended.

    Raises:
        RefusedError: there is no such run.
    """
    folder = run_folder(name)
    latest, said = read_json(folder / LATEST), state_of(folder)
    found: list[tuple[int, str]] = []
    for one in curves(name)["validations"]:
        figures = [("validation loss", one["loss"]), ("of the averaged weights", one["ema"])]
        words = ", ".join(f"{what} {value:.4f}" for what, value in figures if isinstance(value, int | float))
        found.append((one["step"], words))
    found += [(step, "previews") for step in preview_steps(folder)]
    found += [(step, "checkpoint, which is kept") for step in checkpoint_steps(folder / "checkpoints")]
    for event in read_events(folder / "events.jsonl"):
        names = ", ".join(str(each.get("sample")) for each in _samples(event)[:3])
        step = event.get("step")
        found.append((step if isinstance(step, int) else 0, f"{event.get('event')}: {names}"))
    lines = [f"step {step}: {words}" for step, words in sorted(found, key=lambda each: each[0])]
    began, ended = (latest.get(key) for key in ("began", "ended"))
    head = [f"{_clock(began)} started last"] if _clock(began) else []
    end = f"{said['state']} at step {said['step']}{': ' + said['reason'] if said['reason'] else ''}"
    return [*head, *lines[-MOST:], f"{_clock(ended)} {end}".strip()]


def _samples(event: dict[str, Any]) -> list[dict[str, Any]]:
    samples = event.get("samples")
    return [each for each in samples if isinstance(each, dict)] if isinstance(samples, list) else []


def _clock(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not 0 < seconds < 1e11:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
