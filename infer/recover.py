"""Make a recovery adapter: a small LoRA that gives back what quantization took, and stays on beside the user's own.

    python infer/recover.py model=dev precision=nf4 run=recover-nf4 'prompts=[...]' 'held_out=[...]'
    accelerate launch train/train.py ... precision=nf4 adapter.recovery=runs/recover-nf4/adapter
    python infer/compare.py ... +recovery.nf4=runs/recover-nf4/adapter

Layer by layer: each one's error W - Q, W read from its shard and dropped again, is approximated as the velocity feels
it (infer/lowrank.py), and ranks go where a byte gains most. Nothing needs more memory than the quantized transformer in
training, so FLUX.1-dev fits a 24 GB card. `polish` steps then teach all layers together the bf16 model's own velocity.

Writes runs/<run>/adapter/ and runs/<run>/recovery.json.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.quiet import quieten

    quieten()

from diffusers import FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from infer.adapters import RECOVERY, put_pairs
from infer.atomic import replace_file
from infer.attached import save_adapter
from infer.calibrate import Record, Rows, collect, record, relative_errors, stacked, velocities
from infer.checks import check_guidance, check_precision, undecided
from infer.command import check_run_name, pick_device, run_command
from infer.encode import release
from infer.flux import Model, check_model, empty_transformer, fingerprint, load_transformer
from infer.formats import Pair, Pairs
from infer.generate import Sampling
from infer.idle import refuse_idle
from infer.lowrank import Factors, allot, approximate
from infer.originals import Originals, streamed_transformer
from infer.quantize import Precision, dequantized, kind_asked, stored_bytes
from infer.sensitivity import decide
from infer.targets import base_layers


@dataclass
class Recover:
    """One recovery adapter."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    sampling: Sampling = field(default_factory=Sampling)
    """Of the pictures that calibrate it: every step of each is a record."""
    prompts: list[str] = field(default_factory=list)
    """What calibrates it: some dozen that are like what will be drawn."""
    held_out: list[str] = field(default_factory=list)
    """Prompts by which it is measured, none of which calibrates it."""
    share: float = 0.05
    """Its bytes in bf16, as a share of the quantized transformer's."""
    rows: int = 4096
    """Rows of inputs and of gradients kept of each layer, on the host."""
    most: int = 128
    """The highest rank of a layer."""
    polish: int = 0
    """Steps of training towards the bf16 velocity afterwards, one record each."""
    rate: float = 1e-4
    """Their learning rate (Adam, falling to zero as a cosine)."""
    seed: int = 0
    run: str = "recover"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")
        for name, least in (("rows", 1), ("most", 1), ("polish", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; it must be above 0")
        if not self.polish:
            refuse_idle(self, "", ("rate",), "it is that of polish, which is 0 steps")
        if not self.prompts or not self.held_out or set(self.prompts) & set(self.held_out):
            raise ValueError("recover needs prompts, and others as held_out, as in 'prompts=[a red star]'")


def recovered(transformer: FluxTransformer2DModel, originals: Originals, rows: dict[str, Rows], options: Recover,
              device: torch.device) -> Pairs:  # fmt: skip
    """The adapter's pairs, in bf16."""
    factors: dict[str, Factors] = {}
    costs = {}
    for name, layer in tqdm(base_layers(transformer).items(), unit="layer", desc="approximating errors"):
        error = originals.weight(name).to(device) - dequantized(layer).to(device)
        seen = rows.pop(name)
        inputs, gradients = torch.cat(seen.inputs).to(device), torch.cat(seen.gradients).to(device)
        own = approximate(error, inputs, gradients, options.most, seen.tokens)
        factors[name] = Factors(own.down.bfloat16().cpu(), own.up.bfloat16().cpu(), own.gains.cpu())
        costs[name] = 2 * sum(error.shape)
    budget = int(options.share * stored_bytes(transformer))
    ranks = allot({name: own.gains for name, own in factors.items()}, costs, budget)
    return {
        name: Pair(factors[name].down[:rank].contiguous(), factors[name].up[:, :rank].contiguous(), 1.0)
        for name, rank in ranks.items()
    }


def polish(
    transformer: FluxTransformer2DModel, records: list[Record], exact: Tensor, options: Recover, device: torch.device
) -> None:
    """Train the attached recovery adapter towards the velocities `exact` of the records."""
    parameters = [p for name, p in transformer.named_parameters() if f".{RECOVERY}." in name]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=options.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.polish)
    generator = torch.Generator().manual_seed(options.seed)
    order = [int(i) for _ in range(-(-options.polish // len(records))) for i in
             torch.randperm(len(records), generator=generator)][: options.polish]  # fmt: skip
    for at in tqdm(order, unit="step", desc="polishing"):
        with torch.autocast(device.type, transformer.dtype):
            found = transformer(**stacked([records[at]], device, options.precision.dtype))[0]
        wanted = exact[at : at + 1].to(device)
        ((found.float() - wanted).square().mean() / wanted.square().mean()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
        parameter.requires_grad_(False)


def recover(options: Recover) -> Path:
    """Make and measure the adapter; returns its folder.

    Raises:
        ValueError: no layer is quantized, the run exists, or the checkpoint has no unquantized weights.
    """
    if not options.precision.quantized:
        raise ValueError(f"precision is {options.precision.kind}, which loses nothing; choose nf4, fp4 or int8")
    device, folder = pick_device(options.device), check_run_name(options.run)
    if (folder / "adapter").exists():
        raise ValueError(f"{folder / 'adapter'} exists; choose another name with run=..., or delete it")
    check_model(options.model)
    empty = empty_transformer(options.model)
    check_guidance(options.model, {"sampling.guidance": (options.sampling.guidance, Sampling().guidance)})
    check_precision(options.model, undecided(options.precision) or options.precision, device, empty)
    originals = Originals(options.model)
    options.precision = decide(options.model, options.precision, device, print)
    if not options.precision.quantized or not any(kind_asked(options.precision, name) for name in base_layers(empty)):
        raise ValueError("no layer of the transformer is quantized, so nothing is lost; choose another precision")
    transformer = load_transformer(options.model, options.precision, device)
    size = stored_bytes(transformer)
    given = options.model, options.precision
    records = record(transformer, *given, options.prompts, options.sampling, options.seed, device)
    unseen = record(transformer, *given, options.held_out, options.sampling, options.seed + 100_000, device)
    before = velocities(transformer, unseen, device, 1)
    transformer.enable_gradient_checkpointing()
    rows = collect(transformer, records, options.rows, options.seed, device)
    pairs = recovered(transformer, originals, rows, options, device)
    if not pairs:
        raise ValueError(f"share is {options.share}: too little for rank 1 anywhere; raise it")
    put_pairs(transformer, pairs, RECOVERY)
    release(device)
    teacher = streamed_transformer(options.model, device, torch.bfloat16)
    if options.polish:
        polish(transformer, records, velocities(teacher, records, device, 16), options, device)
    exact = velocities(teacher, unseen, device, 16)
    after = velocities(transformer, unseen, device, 1)
    errors = [float(relative_errors(found, exact).square().mean().sqrt()) for found in (before, after)]
    figures = {
        "relative_velocity_error_before": errors[0],
        "relative_velocity_error_after": errors[1],
        "gap_closed": 1 - errors[1] / errors[0],
        "bytes": stored_bytes(transformer) - size,
        "share": (stored_bytes(transformer) - size) / size,
        "records": len(records),
        "held_out_records": len(unseen),
        "ranks": {name: pair.down.shape[0] for name, pair in pairs.items()},
    }
    notes = {"recovers": {"base": fingerprint(options.model, "transformer")}, "precision": asdict(options.precision)}
    save_adapter(transformer, folder / "adapter", notes | {"figures": figures}, RECOVERY)
    text = json.dumps(figures, indent=2) + "\n"
    replace_file(folder / "recovery.json", lambda path: path.write_text(text))
    print(
        f"velocity error against bf16 on {len(unseen)} unseen records: {errors[0]:.4f} -> {errors[1]:.4f} "
        f"({100 * figures['gap_closed']:.1f} % of the gap closed) with {100 * figures['share']:.2f} % more bytes\n"  # type: ignore[operator]
        f"recovery adapter: {folder / 'adapter'}"
    )
    return folder / "adapter"


if __name__ == "__main__":
    run_command("recover", Recover, recover)
