"""Each layer's error measured, kept, shown, and the mixture of kinds that a budget of bytes buys."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from infer.program.atomic import replace_file
from infer.program.run_names import check_run_name
from infer.quantize.precision import Precision
from infer.report.cells import text_table
from infer.report.heat import draw_heat
from infer.rounding.budget import HEADER, Mixture, choose
from infer.rounding.layer_errors import KINDS, kept_file, sensitivities
from infer.rounding.settings import Sensitivity


def propose(options: Sensitivity, device: torch.device) -> Path:
    """Measure, keep, propose; returns the JSON file."""
    folder = check_run_name(options.run)
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


def write_precision(mixture: Mixture, double_quant: bool, file: Path) -> None:
    """A precision's YAML, all fields said."""
    precision = Precision("nf4", double_quant=double_quant, layers=mixture.layers())
    text = f"{HEADER}: {mixture.describe()}\n" + yaml.safe_dump(asdict(precision), sort_keys=False)
    replace_file(file, lambda path: path.write_text(text))
