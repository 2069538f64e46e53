"""Save a checkpoint with its transformer and T5 quantized: a folder that loads faster and fits a smaller disk.

python infer/save.py model=dev precision=nf4 out=models/dev-nf4
python infer/compare.py model.path=models/dev-nf4 'only=[nf4]'
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.adapter.checks import check_precision
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import (
    PARTS,
    Model,
    check_model,
    load_text_parts,
    load_transformer,
    part_folder,
    pipeline_index,
    read_config,
)
from infer.device.device import check_device_name, pick_device
from infer.program.atomic import clear_partials, partial_of, sync_folder, sync_tree
from infer.program.command import run_command
from infer.program.paths import expand
from infer.program.quiet import ready
from infer.quantize.precision import Precision

if TYPE_CHECKING:
    import torch


@dataclass
class Save:
    """What to save, and where."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    out: str = ""
    """A folder that does not exist yet."""
    device: str = "auto"

    def __post_init__(self) -> None:
        expand(self, "out")


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
    index = pipeline_index(model)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save(options: Save) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: `out` is empty or exists, the precision is a mixture, or the checkpoint is quantized otherwise.
    """
    refuse_mixture(options.precision, "load the unquantized checkpoint with the same precision, or save one kind")
    if not options.out or Path(options.out).exists():
        raise ValueError(f"out is {options.out!r}; give a folder that does not exist yet")
    check_device_name(options.device)
    check_model(options.model)
    device = pick_device(options.device)
    check_precision(options.model, options.precision, linear_shapes(read_config(options.model, "transformer")))
    ready()
    out = Path(options.out)
    partial = partial_of(out)
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
