"""Make a recovery adapter: a small LoRA that gives back what quantization took, and stays on beside the user's own.

    python infer/recover.py model=dev precision=nf4 run=recover-nf4 'prompts=[...]' 'held_out=[...]'
    python train/train.py ... precision=nf4 adapter.recovery=runs/recover-nf4/adapter
    python infer/compare.py ... +recovery.nf4=runs/recover-nf4/adapter

Layer by layer: each one's error W - Q, W read from its shard and dropped again, is approximated as the velocity feels
it (infer/rounding/lowrank.py), and ranks go where a byte gains most. Nothing needs more memory than the quantized
transformer in training, so FLUX.1-dev fits a 24 GB card. `polish` steps then teach all layers together the bf16 model's
own velocity.

Writes runs/<run>/adapter/ and runs/<run>/recovery.json.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.adapter.checks import check_guidance, check_precision, undecided
from infer.adapter.lora import RECOVERY
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import Model, check_model, fingerprint, load_transformer, read_config
from infer.device.device import check_device_name, pick_device
from infer.program.atomic import replace_file
from infer.program.bounds import MANY, SEED, STEPS, check_most
from infer.program.command import check_run_name, run_command
from infer.program.no_effect import refuse_idle
from infer.program.quiet import ready
from infer.quantize.precision import Precision, kind_asked, stored_bytes
from infer.sample.generate import Sampling, mend_of


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
        check_most(self, "", share=1000, rows=10**7, most=2**14, polish=STEPS, rate=MANY, seed=SEED // 2)
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


def recover(options: Recover) -> Path:
    """Make and measure the adapter; returns its folder.

    Raises:
        ValueError: no layer is quantized, the run exists, or the checkpoint has no unquantized weights.
    """
    if not options.precision.quantized:
        raise ValueError(f"precision is {options.precision.kind}, which loses nothing; choose nf4, fp4 or int8")
    check_device_name(options.device)
    folder = check_run_name(options.run)
    if (folder / "adapter").exists():
        raise ValueError(f"{folder / 'adapter'} exists; choose another name with run=..., or delete it")
    check_model(options.model)
    layers = linear_shapes(read_config(options.model, "transformer"))
    check_guidance(options.model, {"sampling.guidance": (options.sampling.guidance, Sampling().guidance)})
    check_precision(options.model, undecided(options.precision) or options.precision, layers)
    device = pick_device(options.device)
    ready()
    import torch

    from infer.adapter.attach import put_pairs
    from infer.adapter.attached import save_adapter
    from infer.checkpoint.originals import Originals, streamed_transformer
    from infer.device.device import release
    from infer.quantize.compute import compute_dtype
    from infer.rounding.calibration import collect, record, relative_errors, velocities
    from infer.rounding.layer_errors import decide
    from infer.rounding.recovering import polish, recovered

    if compute_dtype(torch.bfloat16, device) == torch.float16:
        raise ValueError(
            f"{device} has no bf16, in which the unquantized model is run here; make the recovery adapter on a card "
            "from 2020 on (RTX 30, A10, A100), or with device=cpu: it is read on this one"
        )
    originals = Originals(options.model)
    options.precision = decide(options.model, options.precision, device, print)
    if not options.precision.quantized or not any(kind_asked(options.precision, name) for name in layers):
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
    teacher = streamed_transformer(options.model, device, compute_dtype(torch.bfloat16, device))
    if options.polish:
        polish(transformer, records, velocities(teacher, records, device, 16), options, device)
    exact = velocities(teacher, unseen, device, 16)
    after = velocities(transformer, unseen, device, 1)
    errors = [float(relative_errors(found, exact).square().mean().sqrt()) for found in (before, after)]
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            f"the velocity error is {errors[0]} before and {errors[1]} after: a transformer's output is not finite; "
            f"{mend_of(transformer)}"
        )
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            f"the velocity error is {errors[0]} before and {errors[1]} after: a transformer's output is not finite; "
            f"{mend_of(transformer)}"
        )
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
