"""Pictures during training, from the resident quantized model: each prompt without and with the adapter."""

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageDraw

from infer.adapters import switch
from infer.atomic import replace_file
from infer.encode import Text, decode, release
from infer.flux import Model, load_scheduler, load_vae
from infer.generate import Sampling, draw

LABEL = 14  # pixels of a label's line


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
) -> list[tuple[str, Image.Image, Image.Image]]:
    """Draw a sheet, one row a prompt: base at the left, adapter at the right. The autoencoder is loaded for it.

    write: False takes part in the transformer's work and leaves the rest to the rank that writes.
    Returns: prompt, picture without and with the adapter; nothing where it does not write.
    """
    scheduler = load_scheduler(model)
    latents = {}
    for on in (False, True):
        switch(transformer, on)
        for prompt, text in prompts.items():
            latents[prompt, on] = draw(transformer, scheduler, text, seed, sampling, size, device)
    if not write:
        return []
    vae = load_vae(model, device)
    pictures = {place: decode(vae, packed, *size) for place, packed in latents.items()}
    del vae
    release(device)
    height, width = size
    board = Image.new("RGB", (2 * width, len(prompts) * (height + LABEL)), "white")
    pen = ImageDraw.Draw(board)
    for row, prompt in enumerate(prompts):
        top = row * (height + LABEL)
        pen.text((2, top + 1), f"{prompt}  (left: base, right: adapter)", fill="black")
        for column, on in enumerate((False, True)):
            board.paste(pictures[prompt, on], (column * width, top + LABEL))
    replace_file(file, lambda path: board.save(path, format="PNG"))
    return [(prompt, pictures[prompt, False], pictures[prompt, True]) for prompt in prompts]
