"""The loss of a run as a picture, runs/<run>/loss.png: of the training, smoothed, and of the held-out pictures."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from infer.program.atomic import replace_file
from infer.report.plot import Lines, Series, series
from infer.report.png import save_lines
from infer.report.results import Estimate
from train.loop.session import Run
from train.trackers.metrics import read_events

BINS = 50
NAMES = {
    "loss": "training",
    "validation_loss": "held-out pictures (what counts)",
    "validation_loss_ema": "held-out pictures, averaged adapter",
}


def loss_lines(events: Sequence[dict[str, float]]) -> Lines | None:
    """The curves of what metrics.jsonl holds, the training loss as means over bins of steps; None without a step."""
    trained = {int(event["step"]): event["loss"] for event in events if "loss" in event}
    if not trained:
        return None
    width = max(1, -(-max(trained) // BINS))
    binned: dict[int, list[float]] = {}
    for step, loss in trained.items():
        binned.setdefault(-(-step // width) * width, []).append(loss)
    curves = {"loss": {step: fmean(losses) for step, losses in binned.items()}}
    for name in list(NAMES)[1:]:
        curves[name] = {int(event["step"]): event[name] for event in events if name in event}
    steps = sorted({step for curve in curves.values() for step in curve})
    lines: list[Series] = series(
        [
            (NAMES[name], [Estimate(curve[step]) if step in curve else None for step in steps])
            for name, curve in curves.items()
            if curve
        ]
    )
    return Lines("Loss: lower is better" + (f" (training: means of {width} steps)" if width > 1 else ""), steps, lines)


SCORES = {
    "score_likeness": "likeness to the training pictures",
    "score_copying": "share of near copies",
    "score_change": "change of the run's own prompts",
    "score_drift": "drift of unrelated ones",
}


def score_lines(events: Sequence[dict[str, float]]) -> Lines | None:
    """The curves of the scores that metrics.jsonl holds; None without any."""
    curves = {
        name: {int(event["step"]): event[name] for event in events if event.get(name) is not None} for name in SCORES
    }
    steps = sorted({step for curve in curves.values() for step in curve})
    if not steps:
        return None
    found: list[Series] = series(
        [
            (SCORES[name], [Estimate(curve[step]) if step in curve else None for step in steps])
            for name, curve in curves.items()
            if curve
        ]
    )
    return Lines("Scores of drawn pictures", steps, found)


def draw_loss(run: Run) -> None:
    """Write the picture on the main rank, if a step was made."""
    metrics = run.folder / "metrics.jsonl"
    if not run.main or not metrics.is_file():
        return
    events = read_events(metrics)
    lines = loss_lines(events)
    if lines is not None:
        replace_file(run.folder / "loss.png", partial(save_lines, plots=[lines], x_title="step"))
    scored = score_lines(events)
    if scored is not None:
        replace_file(run.folder / "scores.png", partial(save_lines, plots=[scored], x_title="step"))
