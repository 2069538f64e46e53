"""What quantization costs in the objective itself: the same picture, timestep and noise through bf16 and each
precision, without and with an adapter.

    python train/gap.py model=dev run=mine data.path=my_pictures data.resolution=512 adapter.path=runs/mine/adapter

Needs no network but FLUX itself. Precisions run one after another, bf16 first, whose velocities stay in host memory.
Writes gap.json, gap.png and gap.md to runs/<run>/gap/.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from infer.adapter.selection import Trained
from infer.checkpoint.load import Model, check_model
from infer.fast.memory import Memory
from infer.program.atomic import replace_file
from infer.program.bounds import MANY, SEED, check_most
from infer.program.command import check_device_name, check_run_name, pick_device, run_command
from infer.program.no_effect import refuse_idle
from infer.program.quiet import ready
from infer.quantize.precision import Precision, stored_bytes
from infer.report.cells import markdown_table
from infer.report.write import aligned
from train.data.dataset import Data, check_left, read_samples
from train.latents.settings import Encode
from train.objective.flow_matching import Flow
from train.run.config import Train

if TYPE_CHECKING:
    import torch

    from train.probe.probe import Probe

Row = dict[str, Any]


@dataclass
class Gap:
    """What to measure, and on what."""

    model: Model = field(default_factory=Model)
    precisions: dict[str, Precision] = field(default_factory=dict)
    """By name; the others are compared with the first that is not quantized."""
    only: list[str] | None = None
    """Names of the precisions to run; null runs all."""
    adapter: Trained = field(default_factory=Trained)
    data: Data = field(default_factory=Data)
    """Held-out pictures are measured (all, with data.validation=0); give the seed that the adapter was trained with."""
    encode: Encode = field(default_factory=Encode)
    flow: Flow = field(default_factory=Flow)
    memory: Memory = field(default_factory=Memory)
    pictures: int | None = None
    """Pictures at most; null takes all that are held out."""
    levels: int = 8
    """Noise levels, evenly spaced, at which each picture is measured."""
    seed: int = 0
    """Of the noise, and of what is held out."""
    run: str = "train"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_most(self, "", pictures=MANY, levels=10**4, seed=SEED)
        unknown = set(self.only or []) - set(self.precisions)
        if unknown or not self.precisions or self.only == []:
            raise ValueError(f"only names {sorted(unknown)}; choose from {', '.join(self.precisions)}")
        for name in ("levels", "pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self.order()
        reason = "gap measures at evenly spaced noise levels and weights none"
        refuse_idle(self.flow, "flow.", ("density", "logit_mean", "logit_std", "weighting"), reason)
        refuse_idle(self.memory, "memory.", ("graph",), "gap captures nothing")

    def order(self) -> list[str]:
        """The precisions to run, the one that others are compared with first.

        Raises:
            ValueError: all are quantized.
        """
        names = [name for name in self.precisions if self.only is None or name in self.only]
        plain = [name for name in names if self.precisions[name].kind in ("bf16", "fp32")]
        plain = [name for name in plain if not self.precisions[name].layers]
        if not plain:
            raise ValueError(f"{', '.join(names)} are all quantized; add bf16, which they are compared with")
        return [plain[0], *(name for name in names if name != plain[0])]


def measure(options: Gap, memory: dict[str, Memory], device: torch.device) -> list[Row]:
    """One row a precision, adapter, picture and noise level: its loss, and its velocity's relative error. memory: by
    precision, the settings that all of it can run with."""
    from infer.score.pairs import relative_error
    from train.probe.probe import loaded, prepare, probe, switch_on

    rows: list[Row] = []
    reference: dict[str | None, list[Probe]] = {}
    own = options.adapter.path and (options.adapter.name or Path(options.run).name)
    variants = [None, own] if own else [None]
    bar = tqdm(unit="forward", desc="gap")
    for name in options.order():
        job = Train(
            options.model, options.precisions[name], data=options.data, encode=options.encode, flow=options.flow,
            memory=memory[name], validation_levels=options.levels, seed=options.seed,
        )  # fmt: skip
        bar.set_postfix_str(name)
        cache, samples = prepare(job, device, options.pictures)
        with loaded(job, device, bar.write) as transformer:
            size = stored_bytes(transformer)
            for variant in variants:
                if variant:
                    switch_on(transformer, job, options.adapter)
                found = probe(transformer, job, cache, samples, device, bar.update)
                theirs = reference.setdefault(variant, found)
                for one, other in zip(found, theirs, strict=True):
                    place = {"precision": name, "adapter": variant, "picture": one.picture, "level": one.level}
                    error = relative_error(one.velocity, other.velocity) if one is not other else 0.0
                    figures = {"sigma": one.sigma, "loss": one.loss, "error": error}
                    rows.append(place | figures | {"transformer_bytes": size})
            del transformer
    bar.close()
    return rows


def summarise(rows: list[Row]) -> list[Row]:
    """For each precision and adapter, and each noise level (None: all of them): means over pictures, with limits.

    `error` is the velocity's relative error, `loss` the objective, `cost` the loss above the first precision's with the
    same adapter, paired by picture and noise.
    """
    from infer.score.bootstrap import interval

    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["adapter"]), []).append(row)
    first = rows[0]["precision"]
    found = []
    for (precision, adapter), group in groups.items():
        theirs = groups[first, adapter]
        for level in (None, *sorted({row["level"] for row in group})):
            chosen = [row for row in group if level in (None, row["level"])]
            others = [row for row in theirs if level in (None, row["level"])]
            pictures = [(row["picture"], "") for row in chosen]
            costs = [row["loss"] - other["loss"] for row, other in zip(chosen, others, strict=True)]
            entry = {"precision": precision, "adapter": adapter, "level": level}
            entry["sigma"] = None if level is None else chosen[0]["sigma"]
            entry["transformer_bytes"] = group[0]["transformer_bytes"]
            for key, values in (
                ("error", [row["error"] for row in chosen]),
                ("loss", [row["loss"] for row in chosen]),
                ("cost", costs),
            ):
                one = interval(values, pictures)
                assert one is not None
                entry[key] = one._asdict()
            found.append(entry)
    return found


def _text(figure: Row, scale: float = 1.0, digits: int = 4) -> str:
    mean, low, high = (None if figure[key] is None else scale * figure[key] for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def table(summary: list[Row]) -> list[list[str]]:
    """Titles and cells: all levels together, then one column a level with the velocity's error in percent."""
    whole = [entry for entry in summary if entry["level"] is None]
    sigmas = list(dict.fromkeys(entry["sigma"] for entry in summary if entry["level"] is not None))
    lines = [["precision", "adapter", "MiB", "error %", "loss", "cost", *(f"% at {sigma:.3f}" for sigma in sigmas)]]
    for entry in whole:
        own = [e for e in summary if (e["precision"], e["adapter"]) == (entry["precision"], entry["adapter"])]
        cells = [entry["precision"], entry["adapter"] or "none", f"{entry['transformer_bytes'] / 2**20:,.2f}"]
        cells += [_text(entry["error"], 100, 2), _text(entry["loss"]), _text(entry["cost"])]
        lines.append(cells + [_text(e["error"], 100, 2) for e in own if e["level"] is not None])
    return lines


def gap(options: Gap) -> Path:
    """Measure, write the files, return their folder."""
    check_device_name(options.device)
    folder = check_run_name(options.run) / "gap"
    check_model(options.model)
    options.adapter.all()
    check_left(options.data, *read_samples(options.data))
    device = pick_device(options.device)
    ready()
    from infer.adapter.checks import check_running
    from infer.device.measure import describe_device
    from infer.rounding.layer_errors import decide
    from train.loop.supported import check_flow
    from train.probe.curves import draw_curves

    check_flow(options.model, options.flow)
    memory: dict[str, Memory] = {}
    for turn in range(2):  # before anything is measured, and with the mixtures that came of it
        for name in options.order():
            given = options.precisions[name], options.adapter, None, options.memory
            memory[name] = check_running(options.model, *given, device)
        for name in options.order() if turn == 0 else ():
            options.precisions[name] = decide(options.model, options.precisions[name], device, print)
    rows = measure(options, memory, device)
    summary = summarise(rows)
    lines = table(summary)
    result = {"model": options.model.path, "device": describe_device(device), "summary": summary, "rows": rows}
    content = json.dumps(result, indent=1, allow_nan=False) + "\n"
    replace_file(folder / "gap.png", lambda path: draw_curves(summary, path))
    replace_file(folder / "gap.md", lambda path: path.write_text(markdown_table(lines)))
    replace_file(folder / "gap.json", lambda path: path.write_text(content))
    print(aligned(lines))
    print(f"gap: {folder / 'gap.png'}")
    return folder


if __name__ == "__main__":
    run_command("gap", Gap, gap)
