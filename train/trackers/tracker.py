"""Where a run's figures and previews go besides its own folder: Weights & Biases, TensorBoard, or nowhere else.

Every run writes metrics.jsonl to its folder, one JSON object a line with the figures that a tracker gets, and previews/
as PNG. A comparison that infer/compare.py made later reaches the run's tracker by

    python train/track.py run=mine track=wandb
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from train.trackers.options import Track

if TYPE_CHECKING:
    from infer.report.results import Comparison


class Tracker(Protocol):
    """Keeps what a run measures and makes."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures at a step, the same as in metrics.jsonl."""

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """For each prompt its pictures (PIL) by name: base, adapter, and average where the run keeps one."""

    def comparison(self, comparison: "Comparison", folder: Path) -> None:
        """What infer/compare.py measured; the pictures lie in `folder`."""

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        """The finished adapter's folder and its notes: step, settings, trigger."""

    def fail(self, error: BaseException) -> None:
        """The run stopped early. No call follows."""

    def finish(self) -> None:
        """The run is complete. No call follows."""


class NoTracker:
    """Keeps nothing: the run's folder has it all."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Nothing."""

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """Nothing."""

    def comparison(self, comparison: "Comparison", folder: Path) -> None:
        """Nothing."""

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        """Nothing."""

    def fail(self, error: BaseException) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def make_tracker(track: Track, run: str, folder: Path, config: dict[str, Any]) -> Tracker:
    """The tracker of a run.

    Args:
        run: the run's name.
        folder: the run's folder, in which the tracker's files lie.
        config: the run's settings as plain values.

    Raises:
        ValueError: the tracker's package is not installed.
    """
    if track.kind == "wandb":
        from train.trackers.wandb import Wandb

        return Wandb(track, run, folder, config)
    if track.kind == "tensorboard":
        from train.trackers.tensorboard import TensorBoard

        return TensorBoard(folder, config)
    return NoTracker()


@dataclass
class SendComparison:
    """Which run's comparison goes to which tracker."""

    track: Track = field(default_factory=Track)
    run: str = "train"
    """The run whose comparison is sent."""


def send_comparison(options: SendComparison) -> None:
    """Send runs/<run>/compare to the run's tracker.

    Raises:
        ValueError: `track` names no tracker, or the run has no comparison.
    """
    from infer.program.run_names import check_run_name
    from infer.report.results import read_results

    folder = check_run_name(options.run)
    results = folder / "compare" / "results.json"
    if options.track.kind == "none":
        raise ValueError("track is none, so no tracker gets the comparison; set track=wandb or track=tensorboard")
    if not results.is_file():
        raise ValueError(f"there is no {results}; make it with infer/compare.py run={options.run} ...")
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_bytes()) if config.is_file() else {}
    from accelerate import PartialState

    PartialState(cpu=True)  # accelerate's trackers ask it which process they are in
    tracker = make_tracker(options.track, options.run, folder, settings)
    tracker.comparison(read_results(results), results.parent)
    tracker.finish()
    print(f"sent {results.parent} to {options.track.kind}")
