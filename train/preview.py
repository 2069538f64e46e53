"""Pictures during training, from the resident quantized model: each prompt without and with the adapter, and with its
averaged weights where there are any."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageDraw

from infer.adapters import switch
from infer.atomic import replace_file
from infer.encode import Text, decode, release
from infer.flux import Model, load_scheduler, load_vae
from infer.generate import Sampling, draw

LABEL = 14  # pixels of a label's line


@contextmanager
def without_adapter(transformer: FluxTransformer2DModel) -> Iterator[None]:
    switch(transformer, False)
    try:
        yield
    finally:
        switch(transformer, True)


def preview(
    transformer: FluxTransformer2DModel,
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
    """Draw a sheet, one row a prompt: base at the left, then the adapter, then the adapter as it is within `averaged`.
    The autoencoder is loaded for it.

    write: False takes part in the transformer's work and leaves the rest to the rank that writes.
    Returns: each prompt with its pictures by column; nothing where it does not write.
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
    height, width = size
    board = Image.new("RGB", (len(columns) * width, len(prompts) * (height + 2 * LABEL)), "white")
    pen = ImageDraw.Draw(board)
    for row, prompt in enumerate(prompts):
        top = row * (height + 2 * LABEL)
        pen.text((2, top + 1), prompt, fill="black")
        for column, name in enumerate(columns):
            pen.text((column * width + 2, top + LABEL + 1), name, fill="black")
            board.paste(pictures[prompt, name], (column * width, top + 2 * LABEL))
    replace_file(file, lambda path: board.save(path, format="PNG"))
    return [(prompt, {name: pictures[prompt, name] for name in columns}) for prompt in prompts]


def samples_of(sheet: Path, prompts: list[str], size: tuple[int, int], folder: Path) -> dict[str, str]:
    """Cut a sheet's second column, the adapter's pictures, into files in `folder`; their names by prompt."""
    height, width = size
    names = {}
    with Image.open(sheet) as board:
        for row, prompt in enumerate(prompts):
            top = row * (height + LABEL) + LABEL
            picture = board.crop((width, top, 2 * width, top + height))
            name = f"sample-{row}.png"
            replace_file(folder / name, partial(picture.save, format="PNG"))
            names[prompt] = name
    return names
