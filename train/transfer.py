"""Must an adapter run at the precision that it was trained at? Adapters trained at each precision, with several seeds,
are run at each precision.

    python train/transfer.py experiment=tiny_transfer

Each adapter is a training run of its own, runs/<run>/<precision>-<seed>, and resumes like one. Measured are the
objective on the pictures that its run held out, with fixed noise, and with prompts the scores of pictures. Writes
transfer.json, transfer.md and transfer.png to runs/<run>/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import infer  # noqa: F401  which says what is amiss outside of the environment

from tqdm import tqdm

from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.family import own_size
from infer.checkpoint.load import load_scheduler, load_vae
from infer.checkpoint.model import Model
from infer.device.device import pick_device
from infer.fast.memory import Memory
from infer.program.atomic import replace_file
from infer.program.bounds import SEED, STEPS, check_most
from infer.program.command import run_command
from infer.program.no_effect import refuse_idle
from infer.program.quiet import ready
from infer.program.run_names import check_file_names, check_run_name
from infer.quantize.precision import Precision
from infer.report.cells import text_table
from infer.report.markdown import plain_table
from infer.report.results import to_json
from infer.sample.generate import Sampling, draw, settled
from train.data.dataset import Data
from train.data.references import check_taught
from train.data.samples import check_left, read_samples
from train.latents.settings import Encode
from train.objective.flow_matching import Flow
from train.objective.optim import Optim
from train.run.config import Train
from train.run.names import check_names
from train.train import train

if TYPE_CHECKING:
    import torch

    from infer.family.family import Text
    from infer.score.judges import Score
    from train.probe.transfer_summary import TransferRow


@dataclass
class Transfer:
    """What is trained, and what is measured. Fields that train.py has too mean the same."""

    model: Model = field(default_factory=Model)
    precisions: dict[str, Precision] = field(default_factory=dict)
    """At each of them adapters are trained, and each of these is run."""
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    encode: Encode = field(default_factory=Encode)
    flow: Flow = field(default_factory=Flow)
    memory: Memory = field(default_factory=Memory)
    optim: Optim = field(default_factory=Optim)
    sampling: Sampling = field(default_factory=Sampling)
    prompts: list[str] = field(default_factory=list)
    """Drawn with each adapter at each precision, for the scores; none draws none."""
    scores: dict[str, str] = field(default_factory=dict)
    """A name and the dotted path of a function (picture, prompt) -> number."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Training seeds: what is held out, the adapter's start, the noise. Limits are over these."""
    steps: int = 1000
    """Optimizer updates of each adapter."""
    accumulation: int = 1
    """Micro-batches per update."""
    levels: int = 8
    """Noise levels at which each held-out picture is measured."""
    run: str = "transfer"
    """Its folder is runs/<run>."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        refuse_idle(self.sampling, "sampling.", ("model",), "this command draws on one model")
        check_most(self, "", seeds=SEED, steps=STEPS, accumulation=10**4, levels=10**4)
        for name in ("steps", "accumulation", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give two or more, each once: the limits are over them")
        if not self.precisions:
            raise ValueError("precisions is empty; give at least one")
        check_file_names("precisions", self.precisions)
        if bool(self.prompts) != bool(self.scores):
            raise ValueError("prompts and scores go together: give both, or neither")
        if self.adapter.recovery is not None:
            raise ValueError(
                f"adapter.recovery is {self.adapter.recovery!r}, which belongs to one precision, and each adapter is "
                "run at all of them; set it to null"
            )
        if not self.data.validation > 0:
            raise ValueError("data.validation is 0.0, but the objective is measured on held-out pictures; set 0.2")

    def job(self, name: str, seed: int) -> Train:
        """The training run of one adapter."""
        return Train(
            self.model, self.precisions[name], self.adapter, self.data, self.encode, self.flow, self.memory,
            self.optim, self.sampling, run=f"{self.run}/{name}-{seed}", seed=seed, steps=self.steps,
            accumulation=self.accumulation, save_every=0, validate_every=0, validation_levels=self.levels,
            device=self.device,
        )  # fmt: skip

    def adapter_of(self, name: str, seed: int) -> Path:
        """The folder of a trained adapter."""
        return Path("runs") / self.job(name, seed).run / "adapter"


def run_at(options: Transfer, name: str, device: torch.device, scores: dict[str, Score]) -> Iterator[TransferRow]:
    """Every adapter at one precision, the precision named `name`."""
    from infer.adapter.attach import remove_adapter
    from infer.adapter.checks import check_running
    from infer.sample.encode import decode, drawn_texts, text_encoder
    from train.probe.probe import loaded, prepare, probe, switch_on
    from train.probe.transfer_summary import TransferRow

    texts: list[Text] = []
    if options.prompts:
        with text_encoder(options.model, options.precisions[name], device, options.data.text_length) as encoder:
            texts = drawn_texts(options.model, encoder, options.prompts)
    first = options.job(name, options.seeds[0])
    trained = Trained(str(options.adapter_of(name, first.seed)))  # of one kind, they can all run where this one can
    first.memory = check_running(options.model, first.precision, trained, None, options.memory, device)
    with loaded(first, device, tqdm.write) as transformer:
        vae, scheduler = load_vae(options.model, device), load_scheduler(options.model)
        size = options.sampling.size(own_size(options.model))
        for seed in options.seeds:
            job = options.job(name, seed)
            job.memory = first.memory
            cache, samples = prepare(job, device, None)
            for there in options.precisions:
                attached = switch_on(transformer, job, Trained(str(options.adapter_of(there, seed))))
                found = probe(transformer, job, cache, samples, device, lambda count: None)
                figures = {"loss": fmean(one.loss for one in found)}
                pictures = [
                    (decode(vae, draw(transformer, scheduler, text, seed, options.sampling, size, device), *size), p)
                    for text, p in zip(texts, options.prompts, strict=True)
                ]
                figures |= {key: fmean(float(score(*pair)) for pair in pictures) for key, score in scores.items()}
                for adapter_name in attached:
                    remove_adapter(transformer, adapter_name, options.model)
                yield TransferRow(there, name, seed, figures)
        del transformer, vae


def transfer(options: Transfer) -> Path:
    """Train, measure, write the files; returns their folder."""
    folder = check_run_name(options.run)
    for name in options.precisions:
        check_names(options.job(name, options.seeds[0]))
    samples, skipped = read_samples(options.data)
    check_left(options.data, samples, skipped)
    check_taught(options.model, options.data, samples)
    device = pick_device(options.device)
    ready()
    from infer.adapter.checks import check_guidance, check_training
    from infer.device.device import describe_device
    from infer.rounding.layer_errors import decide
    from infer.score.judges import find_scores
    from train.loop.supported import check_flow
    from train.probe.matrix import draw_matrix
    from train.probe.transfer_summary import summarise, table

    scores = find_scores(options.scores)
    check_flow(options.model, options.flow)
    check_guidance(options.model, options.sampling.guidance)
    options.sampling = settled(options.sampling, options.model)
    for turn in range(2):  # before anything is measured, and with the mixtures that came of it
        for name, precision in options.precisions.items():
            try:
                check_training(options.model, precision, options.adapter, options.memory, device)
            except ValueError as error:
                raise ValueError(f"at precisions.{name}: {error}") from error
        for name, precision in options.precisions.items() if turn == 0 else ():
            options.precisions[name] = decide(options.model, precision, device, print)
    for seed in options.seeds:
        for name in options.precisions:
            print(f"training {name}, seed {seed}")
            train(options.job(name, seed))
    rows: list[TransferRow] = []
    with tqdm(total=len(options.precisions) ** 2 * len(options.seeds), unit="adapter", desc="transfer") as bar:
        for name in options.precisions:
            for row in run_at(options, name, device, scores):
                rows.append(row)
                bar.update()
    summary = summarise(rows)
    text = ""
    for figure in dict.fromkeys(entry.figure for entry in summary):
        for key, title in (("mean", figure), ("cost", f"{figure}, against the adapter trained where it runs")):
            lines = table(summary, figure, key)
            print(f"\n{title}:\n{text_table(lines, 1)}")
            text += f"{title}\n\n{plain_table(lines)}\n"
    result: dict[str, Any] = {"model": options.model.path, "device": describe_device(device), "steps": options.steps}
    result |= {"summary": to_json(summary), "rows": [row.to_json() for row in rows]}
    content = json.dumps(result, indent=1, allow_nan=False) + "\n"
    replace_file(folder / "transfer.png", lambda path: draw_matrix(summary, path))
    replace_file(folder / "transfer.md", lambda path: path.write_text(text))
    replace_file(folder / "transfer.json", lambda path: path.write_text(content))
    print(f"transfer: {folder / 'transfer.png'}")
    return folder


if __name__ == "__main__":
    run_command("transfer", Transfer, transfer)
