"""Which tracker a run has: the settings under `track`."""

from dataclasses import dataclass, field

KINDS = ("none", "wandb", "tensorboard")
MODES = ("auto", "online", "offline")


@dataclass
class Track:
    """Where a run's figures go besides metrics.jsonl in its folder, which is always written."""

    kind: str = "none"
    """none, wandb or tensorboard."""
    project: str = "flux-lora"
    """W&B's project; this setting and the next four belong to kind wandb alone."""
    entity: str | None = None
    """W&B's team or user; null takes your default."""
    group: str | None = None
    """Runs of one group stand together; null: none, or the sweep's name for the points of a sweep."""
    tags: list[str] = field(default_factory=list)
    """W&B's tags of the run."""
    mode: str = "auto"
    """online, offline, or auto: as WANDB_MODE says if it is set, else online with a key (WANDB_API_KEY or `wandb
    login`) and offline without."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"track.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.mode not in MODES:
            raise ValueError(f"track.mode is {self.mode!r}; choose one of {', '.join(MODES)}")
