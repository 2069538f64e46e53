"""TensorBoard's event files in runs/<run>/tensorboard: `tensorboard --logdir runs` shows all runs. Figures are float32.

Settings stand as text and, with the last figures, in the HParams tab, where the runs of a sweep are compared.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from infer.report.results import Comparison
from train.trackers.metrics import read_events


class TensorBoard:
    """Events of one run; the file is opened at the first figure, and a resumed run hides what lay beyond its step."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "track=tensorboard needs the tensorboard package: pip install tensorboard, or set track=none"
            ) from error
        self.make, self.folder, self.config = SummaryWriter, folder / "tensorboard", config
        self.writer: Any = None
        self.step, self.last = 0, dict[str, float]()

    def open(self, step: int, beyond: int | None = None) -> Any:
        """The writer; the first time, what an earlier process wrote from step `beyond` on is hidden."""
        if self.writer is None:
            purge = beyond if self.folder.is_dir() else None
            self.writer = self.make(str(self.folder), purge_step=purge, flush_secs=10)
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)
        self.step = max(self.step, step)
        return self.writer

    def log(self, step: int, figures: dict[str, float]) -> None:
        # a validation comes after its step's update, which may lie before the checkpoint that the run goes on from
        writer = self.open(step, step if "lr" in figures or "loss" in figures else step + 1)
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        self.last |= figures

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        for i, (prompt, pictures) in enumerate(rows):
            row = np.concatenate([np.asarray(picture.convert("RGB")) for picture in pictures.values()], axis=1)
            self.open(step, step + 1).add_image(
                f"previews/{i} ({', '.join(pictures)}): {prompt}", row, step, dataformats="HWC"
            )

    def comparison(self, comparison: Comparison, folder: Path) -> None:
        step = max([int(event["step"]) for event in read_events(self.folder.parent / "metrics.jsonl")], default=0)
        writer = self.open(max(step, self.step))
        for row in comparison.rows:
            adapter = f", {row.adapter}" if row.adapter else ""
            with Image.open(folder / row.image) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            name = f"comparison/{row.precision}{adapter}/{row.prompt} (seed {row.seed})"
            writer.add_image(name, pixels, self.step, dataformats="HWC")

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        self.open(self.step).add_text("adapter", f"{folder}\n\n    {notes}", self.step)
        settings = {name: value for name, value in _flat(self.config) if isinstance(value, bool | int | float | str)}
        self.writer.add_hparams(settings, {f"last/{k}": v for k, v in self.last.items()}, run_name=".")

    def fail(self, error: BaseException) -> None:
        if isinstance(error, Exception):
            self.open(self.step).add_text("stopped", str(error), self.step)
        self.finish()

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names with dots, and values."""
    found = []
    for key, value in config.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
