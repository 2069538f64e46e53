"""Where a run's figures and previews go besides its own folder: Weights & Biases, or nowhere."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

KINDS = ("none", "wandb")
MODES = ("auto", "online", "offline")


@dataclass
class Track:
    """Tracking of a run. metrics.jsonl in the run's folder is always written."""

    kind: str = "none"
    """none or wandb."""
    project: str = "flux-lora"
    mode: str = "auto"
    """wandb: online, offline, or auto: WANDB_MODE if it is set, else online with a key (WANDB_API_KEY or
    `wandb login`) and offline without."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"track.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.mode not in MODES:
            raise ValueError(f"track.mode is {self.mode!r}; choose one of {', '.join(MODES)}")


class Tracker(Protocol):
    """What the loop tells."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...
    def picture(self, step: int, file: Path, caption: str) -> None: ...
    def finish(self) -> None: ...


class NoTracker:
    """Tells nobody."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Nothing."""

    def picture(self, step: int, file: Path, caption: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class Wandb:
    """A W&B run in the run's folder; its id is kept there, so that a resumed run continues its curves."""

    def __init__(self, track: Track, run: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("track=wandb needs the wandb package: pip install wandb, or set track=none") from error
        self.wandb = wandb
        mode: Any = track.mode
        if mode == "auto":
            keyed = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
            mode = os.environ.get("WANDB_MODE") or ("online" if keyed else "offline")
        kept = folder / "wandb_id"
        identity = kept.read_text().strip() if kept.is_file() else secrets.token_hex(4)
        kept.write_text(identity)
        self.run = wandb.init(
            project=track.project,
            name=run,
            id=identity,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=config,
        )
        # an axis of our own: W&B drops what comes with a lower step than the last, as a resumed run's may
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"step": step, **figures})

    def picture(self, step: int, file: Path, caption: str) -> None:
        self.run.log({"step": step, "preview": self.wandb.Image(str(file), caption=caption)})

    def finish(self) -> None:
        self.run.finish()


def make_tracker(track: Track, run: str, folder: Path, config: dict[str, Any]) -> Tracker:
    return Wandb(track, run, folder, config) if track.kind == "wandb" else NoTracker()
