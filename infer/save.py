"""Save a checkpoint with its transformer and T5 quantized: a folder that loads faster and fits a smaller disk.

python infer/save.py model=dev precision=nf4 out=models/dev-nf4
python infer/compare.py model.path=models/dev-nf4 'only=[nf4]'
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.quiet import quieten

    quieten()

import diffusers
import torch

from infer.atomic import clear_partials, sync_folder, sync_tree
from infer.checks import check_precision
from infer.command import pick_device, run_command
from infer.flux import PARTS, Model, check_model, empty_transformer, load_text_parts, load_transformer, part_folder
from infer.quantize import Precision


@dataclass
class Save:
    """What to save, and where."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    out: str = ""
    """A folder that does not exist yet."""
    device: str = "auto"


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
    """All of a checkpoint but its transformer: T5 at the precision, the other parts as they are."""
    parts = load_text_parts(model, precision, device)
    parts["text_encoder_2"].save_pretrained(folder / "text_encoder_2")
    for part in PARTS:
        if part not in ("transformer", "text_encoder_2"):
            shutil.copytree(part_folder(model, part), folder / part)
    index = diffusers.FluxPipeline.load_config(model.path, revision=model.revision)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save(options: Save) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: `out` is empty or exists, the precision is a mixture, or the checkpoint is quantized otherwise.
    """
    refuse_mixture(options.precision, "load the unquantized checkpoint with the same precision, or save one kind")
    if not options.out or Path(options.out).exists():
        raise ValueError(f"out is {options.out!r}; give a folder that does not exist yet")
    check_model(options.model)
    device = pick_device(options.device)
    check_precision(options.model, options.precision, device, empty_transformer(options.model))
    out = Path(options.out)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    clear_partials(out.parent, out.name)
    partial.mkdir(parents=True)
    try:
        load_transformer(options.model, options.precision, device).save_pretrained(partial / "transformer")
        save_beside(options.model, options.precision, device, partial)
        sync_tree(partial)
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{options.precision.kind} checkpoint of {size / 2**20:,.1f} MiB in {out}")
    return out


if __name__ == "__main__":
    run_command("save", Save, save)
