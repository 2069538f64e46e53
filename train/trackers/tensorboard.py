"""TensorBoard's event files in runs/<run>/tensorboard: `tensorboard --logdir runs` shows all runs. Figures are float32.

accelerate's tracker opens the writer and writes figures and pictures. Settings stand as text and, with the last
figures, in the HParams tab, where the runs of a sweep are compared. accelerate's store_init_configuration does not do
for that: it refuses nested settings, and writes a second run, named by the time, before there are figures.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from infer.report.results import Comparison
from train.trackers.metrics import read_events


class TensorBoard:
    """Events of one run. The file is opened at the first figure: a resumed run hides the events beyond its step."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401 (accelerate would miss it only at the first figure)
        except ImportError as error:
            raise ValueError(
                "track=tensorboard needs the tensorboard package: pip install tensorboard, or set track=none"
            ) from error
        self.folder, self.config = folder / "tensorboard", config
        self.tracker: TensorBoardTracker | None = None
        self.last_step, self.last_figures = 0, dict[str, float]()

    def open(self, step: int, purge_step: int | None = None) -> Any:
        """accelerate's tracker; opening it hides the events that an earlier process wrote from `purge_step` on."""
        if self.tracker is None:
            purge_step = purge_step if self.folder.is_dir() else None
            self.tracker = TensorBoardTracker(
                self.folder.name, self.folder.parent, purge_step=purge_step, flush_secs=10
            )
            self.tracker.start()
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            self.tracker.tracker.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)
        self.last_step = max(self.last_step, step)
        return self.tracker

    def log(self, step: int, figures: dict[str, float]) -> None:
        # a validation follows its step's update: where it is a resumed run's first event, that update's event stays
        self.open(step, step if "lr" in figures or "loss" in figures else step + 1).log(figures, step)
        self.last_figures |= figures

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        for i, (prompt, pictures) in enumerate(rows):
            row = np.concatenate([np.asarray(picture.convert("RGB")) for picture in pictures.values()], axis=1)
            name = f"previews/{i} ({', '.join(pictures)}): {prompt}"
            self.open(step, step + 1).log_images({name: row[None]}, step, dataformats="NHWC")

    def comparison(self, comparison: Comparison, folder: Path) -> None:
        step = max([int(event["step"]) for event in read_events(self.folder.parent / "metrics.jsonl")], default=0)
        tracker = self.open(max(step, self.last_step))
        for row in comparison.rows:
            adapter = f", {row.adapter}" if row.adapter else ""
            with Image.open(folder / row.image) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            name = f"comparison/{row.precision}{adapter}/{row.asked} (seed {row.seed})"
            tracker.log_images({name: pixels[None]}, self.last_step, dataformats="NHWC")

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        writer = self.open(self.last_step).tracker
        writer.add_text("adapter", f"{folder}\n\n    {notes}", self.last_step)
        settings = {name: value for name, value in _flat(self.config) if isinstance(value, bool | int | float | str)}
        writer.add_hparams(settings, {f"last/{k}": v for k, v in self.last_figures.items()}, run_name=".")

    def fail(self, error: BaseException) -> None:
        if isinstance(error, Exception):
            self.open(self.last_step).tracker.add_text("stopped", str(error), self.last_step)
        self.finish()

    def finish(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every value of nested settings with its dotted name."""
    settings = []
    for key, value in config.items():
        settings += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return settings
