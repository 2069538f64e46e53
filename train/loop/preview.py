"""Pictures during training, from the quantized model in training: each prompt without and with the adapter, and with
the averaged weights if there are any."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, PngImagePlugin

from infer.adapter.attach import switch
from infer.checkpoint.load import Model, load_scheduler, load_vae
from infer.device.device import release
from infer.family.family import Text
from infer.program.atomic import replace_file
from infer.sample.encode import decode
from infer.sample.generate import Sampling, draw

LABEL = 14  # pixels of a label's line
SHEET = "flux_lora_sheet"  # the text of a sheet's PNG that says what is drawn where


def cell(row: int, column: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a picture in a sheet, in pixels. size: height and width of each picture. Two lines
    above it name its row's prompt, which begins at the sheet's left edge, and its column."""
    height, width = size
    left, top = column * width, row * (height + 2 * LABEL) + 2 * LABEL
    return left, top, left + width, top + height


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
) -> list[tuple[str, dict[str, Image.Image]]]:
    """Draw a sheet with one row per prompt: the base, the adapter, and the adapter with its averaged weights.

    The autoencoder is loaded for it and freed afterwards. size: height and width in pixels. write: False takes part in
    the transformer's work only, and leaves the rest to the rank that writes. averaged: puts the averaged weights into
    the adapter for a with-block; None draws no such column.

    Returns: each prompt with its pictures by column; empty without `write`.
    """
    scheduler = load_scheduler(model)
    columns: dict[str, Any] = {"base": without_adapter(transformer), "adapter": nullcontext()}
    if averaged is not None:
        columns["averaged adapter"] = averaged
    latents = {}
    for name, weights in columns.items():
        with weights:
            for prompt, text in prompts.items():
                latents[prompt, name] = draw(transformer, scheduler, text, seed, sampling, size, device)
    if not write:
        return []
    vae = load_vae(model, device)
    pictures = {place: decode(vae, packed, *size) for place, packed in latents.items()}
    del vae
    release(device)
    places = {
        (prompt, name): cell(row, column, size)
        for row, prompt in enumerate(prompts)
        for column, name in enumerate(columns)
    }
    _, _, right, bottom = cell(len(prompts) - 1, len(columns) - 1, size)
    board = Image.new("RGB", (right, bottom), "white")
    pen = ImageDraw.Draw(board)
    for (prompt, name), (left, top, _, _) in places.items():
        if left == 0:
            pen.text((2, top - 2 * LABEL + 1), prompt, fill="black")
        pen.text((left + 2, top - LABEL + 1), name, fill="black")
        board.paste(pictures[prompt, name], (left, top))
    info = PngImagePlugin.PngInfo()
    info.add_text(SHEET, json.dumps({"prompts": list(prompts), "columns": list(columns), "size": size}))
    replace_file(file, lambda path: board.save(path, format="PNG", pnginfo=info))
    return [(prompt, {name: pictures[prompt, name] for name in columns}) for prompt in prompts]


def samples_of(sheet: Path, folder: Path) -> dict[str, str]:
    """Cut the adapter's pictures out of a sheet into files in `folder`; returns their names by prompt.

    The sheet's own metadata names its prompts, since those of the config may have changed since it was drawn. Empty if
    the sheet has no such metadata.
    """
    names = {}
    with Image.open(sheet) as board:
        assert isinstance(board, PngImagePlugin.PngImageFile)
        said = board.text.get(SHEET)
        if said is None:  # an older version drew it and wrote no metadata
            return {}
        drawn = json.loads(said)
        height, width = drawn["size"]
        for row, prompt in enumerate(drawn["prompts"]):
            picture = board.crop(cell(row, drawn["columns"].index("adapter"), (height, width)))
            name = f"sample-{row}.png"
            replace_file(folder / name, partial(picture.save, format="PNG"))
            names[prompt] = name
    for old in folder.glob("sample-*.png"):  # of an earlier card with more pictures
        if old.name not in names.values():
            old.unlink()
    return names
