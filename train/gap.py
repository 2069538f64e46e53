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
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import infer  # noqa: F401  which says what is amiss outside of the environment

from tqdm import tqdm

from infer.adapter.selection import Trained
from infer.checkpoint.headers import check_model
from infer.checkpoint.model import Model
from infer.device.device import check_device_name, pick_device
from infer.fast.memory import Memory
from infer.program.atomic import replace_file
from infer.program.bounds import MANY, SEED, check_most
from infer.program.command import run_command
from infer.program.no_effect import refuse_idle
from infer.program.quiet import ready
from infer.program.run_names import check_run_name
from infer.quantize.precision import Precision
from infer.quantize.storage import stored_bytes
from infer.report.cells import text_table
from infer.report.markdown import plain_table
from infer.report.results import to_json
from train.data.dataset import Data
from train.data.references import check_taught
from train.data.samples import check_left, read_samples
from train.latents.settings import Encode
from train.objective.flow_matching import Flow
from train.run.config import Train

if TYPE_CHECKING:
    import torch

    from train.probe.gap_summary import GapRow
    from train.probe.probe import Probe


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
    """Its folder is runs/<run>; the page goes to runs/<run>/gap."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

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
        plain = [name for name in plain if self.precisions[name].exact]
        if not plain:
            raise ValueError(
                f"{', '.join(names)} are all quantized or multiply in 8 bits; add bf16, which they are compared with"
            )
        return [plain[0], *(name for name in names if name != plain[0])]


def measure(options: Gap, memory: dict[str, Memory], device: torch.device) -> list[GapRow]:
    """One row for each precision, adapter, picture and noise level. memory: by precision, the settings that all of it
    can run with."""
    from infer.checkpoint.files import read_config
    from infer.fast.ready_kernels import prepare_kernels
    from infer.score.pairs import relative_error
    from train.probe.gap_summary import GapRow
    from train.probe.probe import loaded, prepare, probe, switch_on

    rows: list[GapRow] = []
    reference: dict[str | None, list[Probe]] = {}  # of the first precision, for each adapter
    adapter = options.adapter.path and (options.adapter.name or Path(options.run).name)
    for name, each in memory.items():
        prepare_kernels(read_config(options.model, "transformer"), options.precisions[name], each, device)
    bar = tqdm(unit="forward", desc="gap")
    for precision in options.order():
        job = Train(
            options.model, options.precisions[precision], data=options.data, encode=options.encode, flow=options.flow,
            memory=memory[precision], validation_levels=options.levels, seed=options.seed,
        )  # fmt: skip
        bar.set_postfix_str(precision)
        cache, samples = prepare(job, device, options.pictures)
        with loaded(job, device, bar.write) as transformer:
            size = stored_bytes(transformer)
            for variant in (None, adapter) if adapter else (None,):
                if variant:
                    switch_on(transformer, job, options.adapter)
                found = probe(transformer, job, cache, samples, device, bar.update)
                compared = reference.setdefault(variant, found)
                for one, other in zip(found, compared, strict=True):
                    error = 0.0 if one is other else relative_error(one.velocity, other.velocity)
                    rows.append(GapRow(precision, variant, one.picture, one.level, one.sigma, one.loss, error, size))
            del transformer
    bar.close()
    return rows


def gap(options: Gap) -> Path:
    """Measure, write the files, return their folder."""
    check_device_name(options.device)
    folder = check_run_name(options.run) / "gap"
    check_model(options.model)
    options.adapter.all()
    samples, skipped = read_samples(options.data)
    check_left(options.data, samples, skipped)
    check_taught(options.model, options.data, samples)
    device = pick_device(options.device)
    ready()
    from infer.adapter.checks import check_running
    from infer.device.device import describe_device
    from infer.rounding.layer_errors import decide
    from train.loop.supported import check_flow
    from train.probe.curves import draw_curves
    from train.probe.gap_summary import summarise, table

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
    content = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
    replace_file(folder / "gap.png", lambda path: draw_curves(summary, path))
    replace_file(folder / "gap.md", lambda path: path.write_text(plain_table(lines)))
    replace_file(folder / "gap.json", lambda path: path.write_text(content))
    print(text_table(lines))
    print(f"gap: {folder / 'gap.png'}")
    return folder


if __name__ == "__main__":
    run_command("gap", Gap, gap)
