"""Pictures during training, from the quantized model in training: each prompt without and with the adapter, and with
the averaged weights if there are any."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from infer.adapter.attach import switch
from infer.checkpoint.load import Model, load_scheduler, load_vae, own_size
from infer.device.device import release
from infer.family.family import Text
from infer.program.atomic import replace_file
from infer.sample.encode import decode
from infer.sample.generate import Sampling, draw
from train.data.caption import texts_of
from train.data.dataset import Data
from train.loop.batch import Samples
from train.run.config import Train

SHEET = "flux_lora_sheet"  # the text of a sheet's PNG that says what is drawn where
LETTERS = 16  # pixels of a label's letters
LINE = 20  # pixels of a label's line
LEAST = 256  # pixels that a picture is wide at least: smaller ones are enlarged by a whole number, so that text fits
DEFAULT = 2  # prompts that are drawn where none are given


@dataclass
class Layout:
    """Where the pictures of a sheet are: a row a prompt, the prompt above it in as many lines as it needs, a column for
    each way of drawing it, its name above each picture."""

    prompts: list[str]
    columns: list[str]
    size: tuple[int, int]
    """Height and width of each picture as it was drawn."""

    def __post_init__(self) -> None:
        self.scale = max(1, -(-LEAST // self.size[1]))
        self.height, self.width = (side * self.scale for side in self.size)
        self.right = self.width * len(self.columns)
        self.lines = [wrapped(prompt, self.right - 8) for prompt in self.prompts]

    def top(self, row: int) -> int:
        """The first line of pixels of a row's text; of the row behind the last one, the sheet's height."""
        return sum((len(lines) + 1) * LINE + self.height for lines in self.lines[:row])

    def cell(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a picture, in pixels."""
        left, top = column * self.width, self.top(row) + (len(self.lines[row]) + 1) * LINE
        return left, top, left + self.width, top + self.height


def wrapped(text: str, room: int) -> list[str]:
    """A text in lines of at most `room` pixels; a word that is longer by itself is cut."""
    font, lines = ImageFont.load_default(LETTERS), [""]
    for word in text.split():
        while word:
            tried = f"{lines[-1]} {word}".strip()
            if font.getlength(tried) <= room:
                lines[-1], word = tried, ""
            elif lines[-1]:
                lines.append("")
            else:
                fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= room))
                lines[-1], word = word[:fits], word[fits:]
                lines += [""] if word else []
    return lines


def default_prompts(samples: Samples, data: Data) -> list[str]:
    """What is drawn where no prompts are given: captions of held-out pictures, or of the training's, as trained."""
    indices = samples.validation or samples.train
    return list(dict.fromkeys(texts_of(samples.all[i], data)[0][0] for i in indices))[:DEFAULT]


def preview_size(job: Train) -> tuple[int, int]:
    """Height and width of the previews: of sampling, else the training's resolution, at most the checkpoint's own."""
    return job.sampling.size(min(own_size(job.model), max(16, max(job.data.resolutions) // 16 * 16)))


@contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    switch(transformer, False)
    try:
        yield
    finally:
        switch(transformer, True)


def preview(
    transformer: Any,
    model: Model,
    prompts: dict[str, Text],
    sampling: Sampling,
    size: tuple[int, int],
    seed: int,
    device: torch.device,
    file: Path,
    write: bool = True,
    averaged: AbstractContextManager[None] | None = None,
    base: dict[str, Tensor] | None = None,
) -> list[tuple[str, dict[str, Image.Image]]]:
    """Draw a sheet with one row per prompt: the base, the adapter, and the adapter with its averaged weights.

    The autoencoder is loaded for it and freed afterwards. size: height and width in pixels. write: False takes part in
    the transformer's work only, and leaves the rest to the rank that writes. averaged: puts the averaged weights into
    the adapter for a with-block; None draws no such column. base: the base's packed latents by prompt, which stay the
    same during a run; what is not there yet is drawn and added.

    Returns: each prompt with its pictures by column; empty without `write`.
    """
    base = {} if base is None else base
    scheduler = load_scheduler(model)
    columns: dict[str, Any] = {"base": without_adapter(transformer), "adapter": nullcontext()}
    if averaged is not None:
        columns["averaged adapter"] = averaged
    latents = {}
    for name, weights in columns.items():
        with weights:
            for prompt, text in prompts.items():
                packed = base.get(prompt) if name == "base" else None
                if packed is None:
                    packed = draw(transformer, scheduler, text, seed, sampling, size, device)
                latents[prompt, name] = packed
                if name == "base":
                    base[prompt] = packed
    if not write:
        return []
    vae = load_vae(model, device)
    pictures = {place: decode(vae, packed, *size) for place, packed in latents.items()}
    del vae
    release(device)
    board = sheet_of(Layout(list(prompts), list(columns), size), pictures)
    info = PngImagePlugin.PngInfo()
    info.add_text(SHEET, json.dumps({"prompts": list(prompts), "columns": list(columns), "size": size, "layout": 2}))
    replace_file(file, lambda path: board.save(path, format="PNG", pnginfo=info))
    return [(prompt, {name: pictures[prompt, name] for name in columns}) for prompt in prompts]


def sheet_of(layout: Layout, pictures: dict[tuple[str, str], Image.Image]) -> Image.Image:
    """The sheet with its pictures, by prompt and column."""
    board = Image.new("RGB", (layout.right, layout.top(len(layout.prompts))), "white")
    pen, font = ImageDraw.Draw(board), ImageFont.load_default(LETTERS)
    for row, prompt in enumerate(layout.prompts):
        for i, line in enumerate(layout.lines[row]):
            pen.text((4, layout.top(row) + i * LINE), line, fill="black", font=font)
        for column, name in enumerate(layout.columns):
            left, top, _, _ = layout.cell(row, column)
            pen.text((left + 4, top - LINE), name, fill="#555555", font=font)
            picture = pictures[prompt, name]
            board.paste(picture.resize((layout.width, layout.height), Image.Resampling.NEAREST), (left, top))
    return board


def samples_of(sheet: Path, folder: Path) -> dict[str, str]:
    """Cut the adapter's pictures out of a sheet into files in `folder`; returns their names by prompt.

    The sheet's own metadata names its prompts, since those of the config may have changed since it was drawn. Empty if
    the sheet has no such metadata.
    """
    names = {}
    with Image.open(sheet) as board:
        assert isinstance(board, PngImagePlugin.PngImageFile)
        said = board.text.get(SHEET)
        drawn = {} if said is None else json.loads(said)
        if drawn.get("layout") != 2:  # an older version drew it
            return {}
        layout = Layout(drawn["prompts"], drawn["columns"], tuple(drawn["size"]))
        for row, prompt in enumerate(layout.prompts):
            picture = board.crop(layout.cell(row, layout.columns.index("adapter")))
            picture = picture.resize(layout.size[::-1], Image.Resampling.NEAREST)  # as it was drawn, to the pixel
            name = f"sample-{row}.png"
            replace_file(folder / name, partial(picture.save, format="PNG"))
            names[prompt] = name
    for old in folder.glob("sample-*.png"):  # of an earlier card with more pictures
        if old.name not in names.values():
            old.unlink()
    return names
