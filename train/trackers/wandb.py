"""A Weights & Biases run: figures, previews, comparison, adapter, and an alert if the run stops early.

accelerate's tracker starts the run, logs and ends it. What it has no call for is done on W&B's own run: alerts, the
adapter as an artifact, the exit code of a failed run, and tables that stand in one event with their step.

W&B's offline mode writes the same to the run's folder: `wandb sync runs/<run>/wandb/offline-run-*` sends it later.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker

from infer.program.atomic import replace_file
from infer.report.means import score_names
from infer.report.results import Comparison
from train.trackers.options import Track

ID_FILE = "wandb_id"
TITLE_LENGTH = 63  # characters of an alert's title


class Wandb:
    """A W&B run whose files lie in our run's folder. Its id is kept there: a resumed run continues the curves."""

    def __init__(self, track: Track, run: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("track=wandb needs the wandb package: pip install wandb, or set track=none") from error
        self.wandb, self.name, self.warned_of_skipped = wandb, run, False
        mode: Any = track.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE")
            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        # under `wandb agent` the sweep's controller has chosen the id
        file = folder / ID_FILE
        run_id = os.environ.get("WANDB_RUN_ID") or (file.read_text().strip() if file.is_file() else "")
        run_id = run_id or secrets.token_hex(4)
        replace_file(file, lambda path: path.write_text(run_id))
        # the files of artifacts wait for `wandb sync` in the run's folder too, not in the home folder
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").resolve()))
        self.tracker = WandBTracker(
            track.project,  # accelerate calls the project run_name
            entity=track.entity,
            group=track.group,
            tags=track.tags or None,
            name=run,
            id=run_id,
            resume="allow",
            dir=str(folder.resolve()),  # W&B writes in a process of its own, whose folder may be another
            mode=mode,
            config=config,
        )
        self.tracker.start()
        self.run = self.tracker.tracker
        # an axis of our own: W&B drops events whose step is lower than the last one's, and a resumed run has such
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.run.define_metric("validation_loss", step_metric="step", summary="min,last")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.tracker.log({"step": step, **figures})
        if "skipped" in figures and not self.warned_of_skipped:
            self.warned_of_skipped = True
            self._alert("left out an update", f"the loss or gradient of step {step} is not finite", "WARN")

    def previews(self, step: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        if not rows:
            return
        table = self.wandb.Table(columns=["step", "prompt", *rows[0][1]])
        for prompt, pictures in rows:
            table.add_data(step, prompt, *map(self.wandb.Image, pictures.values()))
        # W&B's panel with a slider over the steps takes pictures, not a table
        panel = [self.wandb.Image(pictures["adapter"], caption=prompt) for prompt, pictures in rows]
        self.tracker.log({"step": step, "previews": table, "preview": panel})

    def comparison(self, comparison: Comparison, folder: Path) -> None:
        scores = score_names(comparison.rows)
        columns = ["prompt", "seed", "precision", "adapter", "picture", "seconds", "peak_gib", "weights_gib", *scores]
        table = self.wandb.Table(columns=columns)
        for row in comparison.rows:
            sizes = [count / 2**30 for count in (row.peak_memory_bytes, row.weights_bytes)]
            picture = self.wandb.Image(str(folder / row.image))
            names = [row.asked, row.seed, row.precision, row.adapter or "none"]
            table.add_data(*names, picture, row.seconds, *sizes, *(row.scores.get(name) for name in scores))
        self.tracker.log({"comparison": table})

    def adapter(self, folder: Path, notes: dict[str, Any]) -> None:
        name = re.sub(r"[^\w.-]", "-", f"{self.name}-adapter", flags=re.ASCII)
        artifact = self.wandb.Artifact(name[-128:], type="adapter", metadata=notes)
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def fail(self, error: BaseException) -> None:
        if isinstance(error, Exception):
            self._alert("stopped", str(error), "ERROR")
        self.run.finish(exit_code=1)

    def finish(self) -> None:
        self.tracker.finish()

    def _alert(self, what: str, text: str, level: Any) -> None:
        self.run.alert(f"{self.name} {what}"[-TITLE_LENGTH:], text, level=level)
