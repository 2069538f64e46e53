"""Save a checkpoint with its transformer and text encoder quantized: a folder that loads faster, on a smaller disk.

python infer/save.py model=dev precision=nf4 out=models/dev-nf4
python infer/compare.py model.path=models/dev-nf4 'only=[nf4]'
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.adapter.checks import check_precision
from infer.checkpoint.file_checks import check_written
from infer.checkpoint.files import read_config
from infer.checkpoint.headers import check_model
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.checkpoint.save import refuse_mixture, save_checkpoint
from infer.device.device import check_device_name, pick_device
from infer.program.command import run_command
from infer.program.paths import expand
from infer.program.quiet import ready
from infer.quantize.eight_bit_products import refuse_products
from infer.quantize.precision import Precision


@dataclass
class Save:
    """What to save, and where."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    out: str = ""
    """A folder that does not exist yet."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        expand(self, "out")


def save(options: Save) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: `out` is empty or exists, the precision is a mixture, or the checkpoint is quantized otherwise.
    """
    refuse_mixture(options.precision, "load the unquantized checkpoint with the same precision, or save one kind")
    refuse_products(options.precision, "what is saved: it is how a loaded model multiplies")
    if not options.out or Path(options.out).exists():
        raise ValueError(f"out is {options.out!r}; give a folder that does not exist yet")
    check_device_name(options.device)
    check_model(options.model)
    check_written(options.model)
    device = pick_device(options.device)
    check_precision(options.model, options.precision, linear_shapes(read_config(options.model, "transformer")))
    ready()
    return save_checkpoint(options.model, options.precision, Path(options.out), device)


if __name__ == "__main__":
    run_command("save", Save, save)
