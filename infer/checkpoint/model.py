"""Which FLUX checkpoint is meant: the settings of the group `model`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infer.family.find import SIZES
from infer.program.paths import expand

OPTIONS = {"text_encoder": "text", "text_encoder_2": "text_2", "vae": "vae"}
"""The settings that name a single file of a part, by part."""


@dataclass
class Model:
    """Where a FLUX checkpoint is."""

    path: str = "scripts/tiny/model"
    """A folder in the diffusers format, a Hub id such as black-forest-labs/FLUX.1-dev, or a single file with the
    transformer, safetensors or GGUF (docs/files.md)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id, be it `path` or `parts`."""
    weights: str = "checkpoint"
    """checkpoint, or random: the architecture of a published checkpoint at full size with random weights, to measure
    memory and speed on a machine that holds none."""
    parts: str | None = None
    """Single file only: the folder in the diffusers format, or the Hub id, of what the file lacks; null: the published
    model of its sizes and its name."""
    text: str | None = None
    """A single file in place of the text encoder: CLIP for FLUX.1, Qwen3 or Mistral for FLUX.2."""
    text_2: str | None = None
    """FLUX.1 only: a single file in place of T5."""
    vae: str | None = None
    """A single file in place of the autoencoder."""

    def __post_init__(self) -> None:
        expand(self, "path", "parts", *OPTIONS.values())
        if not self.path:
            raise ValueError("model.path is empty; give a diffusers folder, a Hub id or a file of weights")
        if self.weights not in ("checkpoint", "random"):
            raise ValueError(f"model.weights is {self.weights!r}; choose checkpoint or random")
        if self.random and self.path not in SIZES:
            raise ValueError(
                f"model.weights=random knows the sizes of {', '.join(SIZES)}, not of {self.path!r}; set model=dev"
            )

        for name in ("parts", *OPTIONS.values()):
            self._check_file_option(name)

    def _check_file_option(self, name: str) -> None:
        """Raises:
        ValueError: a setting of single files is empty, or names nothing, or has no effect.
        """
        value = getattr(self, name)
        if value is None:
            return
        if not value:
            raise ValueError(f"model.{name} is empty; name one, or leave it at null")
        if self.random:
            raise ValueError(f"model.{name} has no effect beside model.weights=random; leave it at null")
        if name != "parts" and not Path(value).is_file():
            raise ValueError(f"model.{name} is {value!r}, which is no file here; check the spelling")
        if name == "parts" and self.file is None:
            raise ValueError(
                f"model.parts has no effect on {self.path!r}, which is no file here; leave it at null, or set "
                "model.path to a file with the transformer"
            )

    @property
    def random(self) -> bool:
        return self.weights == "random"

    @property
    def local(self) -> Path | None:
        """The folder, if the path is one."""
        folder = Path(self.path)
        return folder if folder.is_dir() else None

    @property
    def file(self) -> Path | None:
        """The single file, if the path is one."""
        file = Path(self.path)
        return file if file.is_file() else None
