"""Captions for pictures that have none, by a vision-language model: a .txt beside each, and a table to review.

    python train/write_captions.py data.path=my_pictures data.trigger=sks

Captions that are there are kept, so that the same command goes on where it was stopped; to have one written again,
delete its file. `captions.csv` in the folder lists all of them for review: what counts are the .txt files.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import infer  # noqa: F401  which says what is amiss outside of the environment

from tqdm import tqdm

from infer.device.device import check_device_name, pick_device
from infer.program.absent import meant
from infer.program.bounds import check_most
from infer.program.command import run_command
from infer.program.paths import expand, is_hub_id
from infer.program.quiet import ready
from infer.sample.picture import decode
from train.captioning.pictures import Picture, list_pictures, write_caption, write_table

if TYPE_CHECKING:
    import torch


@dataclass
class Folder:
    """The pictures."""

    path: str = ""
    """A folder of pictures."""
    trigger: str | None = None
    """A word to begin each new caption with, if it is not in it; null: none."""

    def __post_init__(self) -> None:
        expand(self, "path")


@dataclass
class WriteCaptions:
    """What to describe, and by what."""

    data: Folder = field(default_factory=Folder)
    captioner: str = "florence-community/Florence-2-large"
    """A Hub id or a folder of a model in transformers' format: Florence-2, or one with a chat template as Qwen-VL."""
    prompt: str | None = None
    """What the captioner is asked; null: Florence-2's task <MORE_DETAILED_CAPTION>, or a question of ours."""
    tokens: int = 160
    """At most so many tokens of a caption."""
    batch_size: int = 4
    """Pictures described at a time."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        expand(self, "captioner")
        check_most(self, "", tokens=4096, batch_size=1024)
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not Path(self.captioner).is_dir() and not is_hub_id(self.captioner):
            raise ValueError(
                f"captioner {self.captioner!r} is no folder here and no Hub id (owner/name); {meant(self.captioner)}"
            )
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty; write what the captioner is asked, or set it to null")


def write_captions(options: WriteCaptions) -> Path:
    """Write what is absent; returns the table.

    Raises:
        ValueError: the folder, a picture or the captioner cannot be read.
    """
    if not options.data.path:
        raise ValueError("data.path is empty; set it to the folder of the pictures")
    check_device_name(options.device)
    folder = Path(options.data.path)
    pictures = list_pictures(folder)
    absent = [picture for picture in pictures if picture.caption is None]
    if absent:
        _describe(options, absent, pick_device(options.device))
    table = write_table(folder, pictures)
    written = sum(picture.caption is not None for picture in absent)
    silent = f", {len(absent) - written} without one" if written < len(absent) else ""
    print(f"{written} captions written, {len(pictures) - len(absent)} kept{silent}; all are in {table} for review")
    return table


def _describe(options: WriteCaptions, absent: list[Picture], device: torch.device) -> None:
    ready()
    from train.captioning.describe import describe, load_captioner
    from train.data.words import has_words

    captioner, trigger = load_captioner(options.captioner, device), options.data.trigger
    bar = tqdm(total=len(absent), unit="picture", desc="captions")
    for first in range(0, len(absent), options.batch_size):
        batch = absent[first : first + options.batch_size]
        shown = [decode(picture.file.read_bytes(), str(picture.file)) for picture in batch]
        for picture, caption in zip(batch, describe(captioner, shown, options.prompt, options.tokens), strict=True):
            bar.update()
            if not caption:
                bar.write(f"no caption for {picture.file.name}: the captioner said nothing of it; write one yourself")
                continue
            if trigger and not has_words(caption, trigger):
                caption = f"{trigger}, {caption}"
            write_caption(picture, caption)
    bar.close()


if __name__ == "__main__":
    run_command("write_captions", WriteCaptions, write_captions)
