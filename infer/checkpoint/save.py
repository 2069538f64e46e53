"""A checkpoint -> a folder of it whose transformer and text encoder are stored quantized, for plain diffusers too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from infer.checkpoint.family import family_of
from infer.checkpoint.files import part_folder, pipeline_index
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.checkpoint.sources import file_of
from infer.checkpoint.text import load_text_parts
from infer.program.atomic import clear_partials, partial_of, sync_folder, sync_tree
from infer.quantize.precision import Precision

if TYPE_CHECKING:
    import torch


def refuse_mixture(precision: Precision, mend: str) -> None:
    """Raises:
    ValueError: the precision is one that no checkpoint is stored in.
    """
    if precision.layers or precision.kind == "auto":
        asked = "precision.layers" if precision.layers else "precision=auto"
        raise ValueError(
            f"{asked} is a mixture of kinds, which is made while a checkpoint is read: diffusers has no way to store "
            f"one; {mend}"
        )


def save_beside(model: Model, precision: Precision, device: torch.device, folder: Path) -> None:
    """All of a checkpoint but its transformer: the large text encoder at the precision, the other parts as they are."""
    import torch

    family = family_of(model)
    parts = load_text_parts(model, precision, device, whole=True)
    large = [encoder.part for encoder in family.ENCODERS if encoder.large]
    for part in large:
        parts[part].save_pretrained(folder / part)
    for part in family.PARTS:
        if part in ("transformer", *large):
            continue
        if file_of(model, part) is None:
            shutil.copytree(part_folder(model, part), folder / part)
        elif part == "vae":
            load_vae(model, torch.device("cpu"), torch.float32).save_pretrained(folder / part)
        else:
            parts[part].save_pretrained(folder / part)
    # without the head of a language model: plain diffusers would make one, in 4 bits without their scales
    index = pipeline_index(model) | {part: ["transformers", type(parts[part]).__name__] for part in large}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_checkpoint(model: Model, precision: Precision, out: Path, device: torch.device) -> Path:
    """Write the folder `out`, whole or not at all; returns it."""
    partial = partial_of(out)
    clear_partials(out.parent, out.name)
    partial.mkdir(parents=True)
    try:
        load_transformer(model, precision, device).save_pretrained(partial / "transformer")
        save_beside(model, precision, device, partial)
        sync_tree(partial)
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{precision.kind} checkpoint of {size / 2**20:,.1f} MiB in {out}")
    return out
