"""Pictures during training, from the quantized model in training: each prompt without and with the adapter, and with
the averaged weights if there are any."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from infer.adapter.attached import adapter_state
from infer.adapter.switch import without_adapter
from infer.checkpoint.family import own_size
from infer.checkpoint.load import load_scheduler, load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.family.family import Text
from infer.family.packing import FACTOR, pack
from infer.program.atomic import replace_file
from infer.sample.edit import Edit, label
from infer.sample.encode import NotFiniteError, decode
from infer.sample.generate import Sampling, draw
from infer.sample.references import encode_files
from infer.sample.sheet import Layout, sheet_of
from train.data.caption import texts_of
from train.data.dataset import Data
from train.latents.store import Cache
from train.loop.batch import Samples
from train.loop.second import NoRoomError, Second, draw_on
from train.run.config import Train

SHEET = "flux_lora_sheet"  # the text of a sheet's PNG that says what is drawn where
DEFAULT = 2  # prompts that are drawn where none are given


def default_previews(samples: Samples, data: Data) -> dict[str, int]:
    """What is drawn where no prompts are given: captions of held-out pictures, or of the training's, as trained, each
    with its sample, whose references go with it."""
    found: dict[str, int] = {}
    for i in samples.validation or samples.train:
        names = [reference.name for reference in samples.all[i].references]
        found.setdefault(label(texts_of(samples.all[i], data)[0][0], names), i)
        if len(found) == DEFAULT:
            break
    return found


def texts_of_previews(
    job: Train, samples: Samples, cache: Cache, device: torch.device
) -> tuple[dict[str, Text], dict[str, Edit]]:
    """The texts of the previews by their names, and for previews with reference files the edits that name those."""
    texts: dict[str, Text] = {prompt: cache.text(prompt) for prompt in job.previews or []}
    edits: dict[str, Edit] = {}
    for name, i in default_previews(samples, job.data).items() if job.previews is None else ():
        sample, view = samples.all[i], cache.views(i)[0][0]
        prompt = texts_of(sample, job.data)[0][0]
        texts[name] = replace(cache.text(prompt), references=tuple(cache.references(i, view, 0)))
        places = [reference.file for reference in sample.references]
        if places and None not in places:
            edits[name] = Edit(prompt, [str(place) for place in places])
    if job.edits:
        vae = load_vae(job.model, device)
        files = [file for edit in job.edits for file in edit.references]
        latents = encode_files(vae, files, job.data.reference_resolution or max(job.data.resolutions))
        del vae
        release(device)
        for edit in job.edits:
            name = label(edit.prompt, edit.references)
            texts[name] = replace(cache.text(edit.prompt), references=tuple(latents[file] for file in edit.references))
            edits[name] = edit
    return texts, edits


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
    """Draw a sheet with one row per prompt: its first reference if there are some, the base, the adapter, and the
    adapter with its averaged weights.

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
    pictures = {}
    if any(text.references for text in prompts.values()):
        pictures = {(prompt, "reference"): _reference(vae, text, size) for prompt, text in prompts.items()}
    pictures |= {place: decode(vae, packed, *size) for place, packed in latents.items()}
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


def _reference(vae: Any, text: Text, size: tuple[int, int]) -> Image.Image:
    """The first reference as the transformer is given it, within a picture of this height and width."""
    ground = Image.new("RGB", size[::-1], "white")
    if text.references:
        first = text.references[0]
        picture = decode(vae, pack(first[None]), first.shape[-2] * FACTOR, first.shape[-1] * FACTOR)
        picture = ImageOps.contain(picture, ground.size)
        ground.paste(picture, ((ground.width - picture.width) // 2, (ground.height - picture.height) // 2))
    return ground


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
