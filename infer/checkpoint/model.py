"""Which FLUX checkpoint is meant: the settings of the group `model`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infer.family.find import SIZES
from infer.program.paths import expand


@dataclass
class Model:
    """Where a FLUX checkpoint is."""

    path: str = "scripts/tiny/model"
    """A folder in the diffusers format, or a Hub id such as black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    weights: str = "checkpoint"
    """checkpoint, or random: the architecture of a published checkpoint at full size with random weights, to measure
    memory and speed on a machine that holds none."""

    def __post_init__(self) -> None:
        expand(self, "path")
        if not self.path:
            raise ValueError("model.path is empty; give a diffusers folder or a Hub id")
        if self.weights not in ("checkpoint", "random"):
            raise ValueError(f"model.weights is {self.weights!r}; choose checkpoint or random")
        if self.random and self.path not in SIZES:
            raise ValueError(
                f"model.weights=random knows the sizes of {', '.join(SIZES)}, not of {self.path!r}; set model=dev"
            )

    @property
    def random(self) -> bool:
        return self.weights == "random"

    @property
    def local(self) -> Path | None:
        """The folder, if the path is one."""
        folder = Path(self.path)
        return folder if folder.is_dir() else None
