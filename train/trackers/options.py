"""Where a run's figures and previews go besides its own folder: Weights & Biases, TensorBoard, or nowhere.

The plain tracker is always there: metrics.jsonl in the run's folder, one JSON object a line, with the figures that the
others get, and previews/ as PNG. What was compared later, with infer/compare.py, reaches the run's tracker by

    python train/track.py run=mine track=wandb
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

KINDS = ("none", "wandb", "tensorboard")
MODES = ("auto", "online", "offline")


@dataclass
class Track:
    """Tracking of a run. metrics.jsonl in the run's folder is always written."""

    kind: str = "none"
    """none, wandb or tensorboard."""
    project: str = "flux-lora"
    """wandb: the project, as the next three."""
    entity: str | None = None
    """The team or user; null takes your default."""
    group: str | None = None
    """Runs of one name stand together; a sweep gives its own."""
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"
    """wandb: online, offline, or auto: WANDB_MODE if it is set, else online with a key (WANDB_API_KEY or
    `wandb login`) and offline without."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"track.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.mode not in MODES:
            raise ValueError(f"track.mode is {self.mode!r}; choose one of {', '.join(MODES)}")


class Tracker(Protocol):
    """What a run tells."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures at a step; those that metrics.jsonl gets."""

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """For each prompt its pictures (PIL) by name: base, adapter, and its average where there is one."""

    def comparison(self, result: dict[str, Any], folder: Path) -> None:
        """What results.json of infer/compare.py holds; the pictures lie in `folder`."""

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        """The finished adapter's folder and what is known of it."""

    def fail(self, error: BaseException) -> None:
        """The run stopped short; the last call."""

    def finish(self) -> None:
        """All is told; the last call."""


class NoTracker:
    """Tells nobody."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Nothing."""

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """Nothing."""

    def comparison(self, result: dict[str, Any], folder: Path) -> None:
        """Nothing."""

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        """Nothing."""

    def fail(self, error: BaseException) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def make_tracker(track: Track, run: str, folder: Path, config: dict[str, Any]) -> Tracker:
    """The tracker of a run; config: its settings as plain values.

    Raises:
        ValueError: its package is not installed.
    """
    if track.kind == "wandb":
        from train.trackers.wandb import Wandb

        return Wandb(track, run, folder, config)
    if track.kind == "tensorboard":
        from train.trackers.tensorboard import TensorBoard

        return TensorBoard(folder, config)
    return NoTracker()


@dataclass
class Told:
    """A run whose comparison is told to its tracker."""

    track: Track = field(default_factory=Track)
    run: str = "train"


def tell_comparison(told: Told) -> None:
    """Add runs/<run>/compare to what the run's tracker has.

    Raises:
        ValueError: there is no tracker, or no comparison.
    """
    from infer.program.command import check_run_name

    folder = check_run_name(told.run)
    results = folder / "compare" / "results.json"
    if told.track.kind == "none":
        raise ValueError("track is none, and nobody is told; choose track=wandb or track=tensorboard")
    if not results.is_file():
        raise ValueError(f"there is no {results}; make it with infer/compare.py run={told.run} ...")
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_bytes()) if config.is_file() else {}
    tracker = make_tracker(told.track, told.run, folder, settings)
    tracker.comparison(json.loads(results.read_text()), results.parent)
    tracker.finish()
    print(f"told {told.track.kind}: {results.parent}")
