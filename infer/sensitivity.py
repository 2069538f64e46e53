"""Which layers suffer from quantization: the velocity's error when each alone is quantized, and the mixture of kinds
that a budget of bytes buys.

    python infer/sensitivity.py model=dev budget_gib=8 out=configs/precision/mine.yaml
    python infer/compare.py model=dev +precision@precisions.mine=mine 'only=[bf16,nf4,mine]'

One bf16 transformer draws a few prompts; at the latents that it comes by, each group of layers that read one input has
its weights replaced by their quantized values and put back. Needs no data and no network but FLUX itself. Writes
sensitivity.json and sensitivity.png to runs/<run>/; precision=auto does the same where no measurement is kept yet.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.adapter.checks import check_guidance
from infer.checkpoint.load import Model, check_model
from infer.program.atomic import replace_file
from infer.program.bounds import GIB, check_most
from infer.program.command import check_device_name, check_run_name, pick_device, run_command
from infer.program.paths import expand
from infer.program.quiet import ready
from infer.report.cells import text_table
from infer.rounding.budget import HEADER, choose
from infer.sample.generate import Sampling

PROMPTS = (
    "a large red star in the middle on a sky background",
    "two blue circles on a cream background",
    "a photo of a cat on a wooden table",
    "a portrait of an old man, oil painting",
)


@dataclass
class Sensitivity:
    """What to measure, and what to make of it."""

    model: Model = field(default_factory=Model)
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    """What is drawn to come by latents; the prompt's place in the list is its seed."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=4))
    """Latents of every step are measured at; null sizes take the checkpoint's own, at most 512."""
    double_quant: bool = False
    """Quantize the absmax of 4-bit layers too."""
    budget_gib: float | None = None
    """Bytes of the transformer that the mixture may take; null proposes none."""
    out: str | None = None
    """A YAML file for the mixture, as one of configs/precision; null writes none."""
    run: str = "sensitivity"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_most(self, "", budget_gib=GIB)
        expand(self, "out")
        if not self.prompts:
            raise ValueError("prompts is empty; give at least one, as in 'prompts=[a red star]'")
        if self.out is not None and self.budget_gib is None:
            raise ValueError(f"out is {self.out!r}, but budget_gib is null; say how many bytes the mixture may take")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"budget_gib is {self.budget_gib}; it must be above 0, or null")


def sensitivity(options: Sensitivity) -> Path:
    """Measure, keep, propose; returns the JSON file."""
    folder = check_run_name(options.run)
    check_device_name(options.device)
    check_model(options.model)
    file = None if options.out is None else Path(options.out)
    if file is not None and file.exists() and not (file.is_file() and HEADER in file.read_text(errors="replace")):
        raise ValueError(f"out is {options.out!r}, which is there and not of this command; give another file")
    check_guidance(options.model, {"sampling.guidance": (options.sampling.guidance, Sampling().guidance)})
    device = pick_device(options.device)
    ready()
    from infer.report.heat import draw_heat
    from infer.rounding.layer_errors import KINDS, kept_file, sensitivities, write_precision

    found = sensitivities(options, device, print)
    content = json.dumps(found, indent=1) + "\n"
    for file in (kept_file(options.model, options.double_quant), folder / "sensitivity.json"):
        replace_file(file, lambda path: path.write_text(content))
    replace_file(folder / "sensitivity.png", lambda path: draw_heat(found["groups"], path))
    worst = sorted(found["groups"], key=lambda group: -group["errors"]["nf4"])[:12]
    lines = [["layers", "error % nf4", "int8", "KiB nf4"]]
    for group in worst:
        name = group["layers"][0] + "".join(f", {other.rpartition('.')[2]}" for other in group["layers"][1:])
        shown = [f"{100 * group['errors'][kind] ** 0.5:.3f}" for kind in KINDS]
        lines.append([name, *shown, f"{group['bytes']['nf4'] / 2**10:,.0f}"])
    print(f"the {len(worst)} of {len(found['groups'])} groups of layers that suffer most, each quantized alone:")
    print(text_table(lines, 1))
    if options.budget_gib is not None:
        mixture = choose(found, int(options.budget_gib * 2**30), "budget_gib")
        print(mixture.describe())
        if options.out is not None:
            write_precision(mixture, options.double_quant, Path(options.out))
            print(f"precision: {options.out}")
    print(f"figure: {folder / 'sensitivity.png'}")
    return folder / "sensitivity.json"


if __name__ == "__main__":
    run_command("sensitivity", Sensitivity, sensitivity)
