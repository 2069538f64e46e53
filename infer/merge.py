r"""Merge adapters into a checkpoint and quantize it: a folder that needs no adapter any more.

    python infer/merge.py model=dev precision=nf4 adapter.path=runs/mine/adapter out=models/mine-nf4
    python infer/merge.py model=dev precision=nf4 out=models/both adapter.path=a adapter.weight=0.8 \
        'adapter.also=[{path:b,weight:0.5}]'

Shard by shard from the unquantized checkpoint: W + strength x B A, rounded once. Merging straight into 4-bit weights
rounds twice, and an update smaller than half a step is lost there: that is refused, with the loss measured.
`out` gets merge.md and merge.json, which say for each layer how much of the update is left; with prompts, pictures too.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.adapter.checks import check_guidance, check_precision
from infer.adapter.read import check_fit, read_pairs
from infer.adapter.selection import Trained
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import Model, check_model, load_transformer, read_config
from infer.device.device import check_device_name, pick_device
from infer.program.atomic import clear_partials, partial_of, sync_folder, sync_tree
from infer.program.bounds import SEED, check_most
from infer.program.command import run_command
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand
from infer.program.quiet import ready
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling
from infer.save import refuse_mixture, save_beside


@dataclass
class Merge:
    """What is merged into what, and where it goes."""

    model: Model = field(default_factory=Model)
    """The unquantized checkpoint."""
    precision: Precision = field(default_factory=Precision)
    """Of the result."""
    adapter: Trained = field(default_factory=Trained)
    out: str = ""
    """A folder that does not exist yet."""
    prompts: list[str] = field(default_factory=list)
    """Drawn with the adapters in bf16, with them at run time at `precision`, and merged."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_most(self, "", seed=SEED)
        expand(self, "out")


def merge(options: Merge) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: `out` is empty or exists, an adapter does not fit, or the checkpoint is quantized already.
    """
    refuse_mixture(options.precision, "merge with precision=bf16, and load the result with the same precision")
    if not options.prompts:
        reason = "nothing is drawn, since prompts is empty"
        refuse_idle(options, "", ("seed",), reason)
        refuse_idle(options.sampling, "sampling.", ("steps", "guidance", "height", "width"), reason)
    check_device_name(options.device)
    check_model(options.model)
    chosen = options.adapter.all()
    if not chosen:
        raise ValueError("adapter.path is null; give the LoRA file to merge, more of them as adapter.also=[{path:b}]")
    if not options.out or Path(options.out).exists():
        raise ValueError(f"out is {options.out!r}; give a folder that does not exist yet")
    device, out = pick_device(options.device), Path(options.out)
    config = read_config(options.model, "transformer")
    layers = linear_shapes(config)
    check_guidance(options.model, {"sampling.guidance": (options.sampling.guidance, Sampling().guidance)})
    check_precision(options.model, options.precision, layers)
    ready()
    read = [(one, read_pairs(one.path)) for one in chosen]
    for one, pairs in read:
        check_fit(pairs, layers, one.path)
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    from infer.adapter.error_init import settled
    from infer.adapter.merge_report import compare_pictures, report, straight_loss
    from infer.adapter.merging import Part, write_transformer
    from infer.checkpoint.originals import Originals

    with init_empty_weights():
        empty = FluxTransformer2DModel.from_config(config)
    parts: dict[str, list[Part]] = {}
    for one, pairs in read:
        for layer, pair in settled(empty, one.path, pairs, None)[0].items():
            parts.setdefault(layer, []).append((pair, one.weight))
    if any(len(own) > 1 and any(pair.magnitude is not None for pair, _ in own) for own in parts.values()):
        raise ValueError("DoRA is merged alone: its magnitude says nothing of a sum with another adapter")
    if "quantization_config" in config:
        loss = straight_loss(load_transformer(options.model, options.precision, device), parts, options.precision)
        raise ValueError(
            f"{options.model.path} is quantized already: merged straight into it, {100 * loss:.0f} % of the update "
            "would be rounded away (measured on its layers); give the unquantized checkpoint as model.path"
        )
    originals = Originals(options.model)
    partial = partial_of(out)
    clear_partials(out.parent, out.name)
    partial.mkdir(parents=True)
    try:
        kept = write_transformer(options, originals, parts, partial / "transformer", device)
        save_beside(options.model, options.precision, device, partial)
        pictures = []
        if options.prompts:
            how = options.precision, options.adapter, options.prompts, options.sampling, options.seed
            pictures = compare_pictures(options.model, str(partial), *how, device, partial)
        print(report(kept, pictures, [f"{one.path} x {one.weight:g}" for one in chosen], options.precision, partial))
        sync_tree(partial)
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"merged checkpoint: {out}")
    return out


if __name__ == "__main__":
    run_command("merge", Merge, merge)
