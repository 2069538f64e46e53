"""Prompts with reference pictures, for FLUX.1 Kontext and FLUX.2: checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infer.checkpoint.family import takes_references
from infer.checkpoint.model import Model
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand, expanded
from infer.sample.picture import SUFFIXES

LARGEST = 8192  # pixels a side
MOST = 10  # references of a sample or a prompt, as FLUX.2-dev takes at most


@dataclass
class Edit:
    """A prompt, and the pictures that it speaks of."""

    prompt: str = ""
    """What is drawn, such as 'make the star blue'."""
    references: list[str] = field(default_factory=list)
    """Files of its reference pictures, in their order."""
    mask: str | None = None
    """A greyscale picture of the drawn one's shape, white where the edit belongs: infer/compare.py scores what should
    not have changed outside of it, against the first reference, and what changed within."""
    target: str | None = None
    """The picture as it should be: infer/compare.py scores the likeness to it."""

    def __post_init__(self) -> None:
        self.references = [expanded(file) for file in self.references]
        expand(self, "mask", "target")
        if not self.references:
            raise ValueError(
                f"edits has {self.prompt!r} without references; name its pictures, as in "
                "edits=[{prompt: make it blue, references: [before.png]}], or put it among the prompts"
            )
        if len(self.references) > MOST:
            raise ValueError(f"edits has {len(self.references)} references of {self.prompt!r}; give {MOST} at most")


def label(prompt: str, references: Sequence[str]) -> str:
    """A prompt with its references, as sheets and messages name it."""
    return f"{prompt}{''.join(f' [{file}]' for file in references)}"


def check_resolution(name: str, resolution: int | None) -> None:
    """See that references can be scaled to a resolution.

    Raises:
        ValueError: it is no multiple of 16, or out of bounds.
    """
    if resolution is not None and not (16 <= resolution <= LARGEST and resolution % 16 == 0):
        near = min(LARGEST, max(16, round(resolution / 16) * 16))
        raise ValueError(f"{name} is {resolution}; FLUX packs multiples of 16 up to {LARGEST}, such as {near}, or null")


def check_files(option: str, files: Sequence[str]) -> None:
    """See that pictures are there; option: what names them.

    Raises:
        ValueError: one is not.
    """
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{option} names {file!r}, which is no file here; write a picture's path")
        if Path(file).suffix.lower() not in SUFFIXES:
            raise ValueError(f"{option} names {file!r}, which is no picture ({', '.join(SUFFIXES)})")


def check_once(edits: Sequence[Edit]) -> None:
    """See that no prompt has the same references twice.

    Raises:
        ValueError: one has.
    """
    for i, edit in enumerate(edits):
        if any((edit.prompt, edit.references) == (other.prompt, other.references) for other in edits[:i]):
            raise ValueError(f"edits has {edit.prompt!r} with {', '.join(edit.references)} twice; give each once")


def check_edits(edits: Sequence[Edit], model: Model, adapted: bool, scored: bool = False) -> None:
    """See that the references are there, and that somebody knows what to do with them.

    adapted: whether an adapter is on, which may have learned it. scored: whether masks and targets are looked at.

    Raises:
        ValueError: a file is not there; or the checkpoint was not trained with references and no adapter is on.
    """
    if not edits:
        return
    for edit in edits:
        check_files("edits", [*edit.references, *(file for file in (edit.mask, edit.target) if file is not None)])
        if not scored:
            refuse_idle(edit, "edits: ", ("mask", "target"), "infer/compare.py alone scores pictures")
    if not adapted and not takes_references(model):
        raise ValueError(f"edits gives references, but {untaught(model)}; give an adapter that was (adapter.path)")


def untaught(model: Model) -> str:
    """What is said of a checkpoint that was not trained with references."""
    return (
        f"{model.path} was not trained with reference pictures (FLUX.1 Kontext and FLUX.2 were: model=kontext, "
        "model=klein4b)"
    )
