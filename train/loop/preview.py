"""Pictures during training, from the quantized model in training: each prompt without and with the adapter, and with
the averaged weights if there are any."""

import json
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from infer.adapter.attach import without_adapter
from infer.adapter.attached import adapter_state
from infer.checkpoint.family import own_size
from infer.checkpoint.load import load_scheduler, load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.family.family import Text
from infer.program.atomic import replace_file
from infer.sample.encode import NotFiniteError, decode
from infer.sample.generate import Sampling, draw
from infer.sample.sheet import Layout, sheet_of
from train.data.caption import texts_of
from train.data.dataset import Data
from train.loop.batch import Samples
from train.loop.second import NoRoomError, Second, draw_on
from train.run.config import Train

SHEET = "flux_lora_sheet"  # the text of a sheet's PNG that says what is drawn where
DEFAULT = 2  # prompts that are drawn where none are given


def default_prompts(samples: Samples, data: Data) -> list[str]:
    """What is drawn where no prompts are given: captions of held-out pictures, or of the training's, as trained."""
    indices = samples.validation or samples.train
    return list(dict.fromkeys(texts_of(samples.all[i], data)[0][0] for i in indices))[:DEFAULT]


def preview_size(job: Train) -> tuple[int, int]:
    """Height and width of the previews: of sampling, else the training's resolution, at most the checkpoint's own."""
    return job.sampling.size(min(own_size(job.model), max(16, max(job.data.resolutions) // 16 * 16)))


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
    second: Second | None = None,
) -> list[tuple[str, dict[str, Image.Image]]]:
    """Draw a sheet with one row per prompt: the base, the adapter, and the adapter with its averaged weights.

    The autoencoder is loaded for it and freed afterwards. size: height and width in pixels. write: False takes part in
    the transformer's work only, and leaves the rest to the rank that writes. averaged: puts the averaged weights into
    the adapter for a with-block; None draws no such column. base: the base's packed latents by prompt, which stay the
    same during a run; what is not there yet is drawn and added. second: a checkpoint that all of it is drawn on too; it
    gets no columns if there is no memory for it, which is said.

    Returns: each prompt with its pictures by column; empty without `write`.
    """
    base = {} if base is None else base
    scheduler = load_scheduler(model)
    columns: dict[str, Any] = {"base": without_adapter(transformer), "adapter": nullcontext()}
    if averaged is not None:
        columns["averaged adapter"] = averaged
    latents, states = {}, {}
    for name, weights in columns.items():
        with weights:
            if second is not None and name != "base":
                states[name] = adapter_state(transformer)
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
    if second is not None:
        try:
            pictures |= draw_on(second, states, prompts, size, device)
        except (NoRoomError, NotFiniteError) as error:
            tqdm.write(f"note: no previews on the second checkpoint: {error}")
    names = list(dict.fromkeys(column for _, column in pictures))
    board = sheet_of(Layout(list(prompts), names, size), pictures)
    info = PngImagePlugin.PngInfo()
    info.add_text(SHEET, json.dumps({"prompts": list(prompts), "columns": names, "size": size, "layout": 2}))
    replace_file(file, lambda path: board.save(path, format="PNG", pnginfo=info))
    return [(prompt, {name: pictures[prompt, name] for name in names}) for prompt in prompts]


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
