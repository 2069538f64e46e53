r"""Merge adapters into a checkpoint and quantize it: a folder that needs no adapter any more.

    python infer/merge.py model=dev precision=nf4 adapter.path=runs/mine/adapter out=models/mine-nf4
    python infer/merge.py model=dev precision=nf4 out=models/both adapter.path=a adapter.weight=0.8 \
        'adapter.also=[{path:b,weight:0.5}]'

Shard by shard from the unquantized checkpoint: W + strength x B A, rounded once. Merging straight into 4-bit weights
rounds twice, and an update smaller than half a step is lost there: that is refused, with the loss measured.
`out` gets merge.md and merge.json, which say for each layer how much of the update is left; with prompts, pictures too.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.quiet import quieten

    quieten()

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from infer.adapters import check_fit
from infer.atomic import sync_folder, sync_tree
from infer.checks import check_guidance, check_precision
from infer.command import pick_device, run_command
from infer.flux import Model, check_model, empty_transformer, load_transformer, read_config
from infer.formats import Pair, read_pairs
from infer.generate import Sampling
from infer.idle import refuse_idle
from infer.merge_report import Kept, compare_pictures, kept_of, report, straight_loss
from infer.originals import Originals
from infer.quantize import Precision, linear_layers, quantization_config
from infer.requantize import quantized_layer
from infer.residual import settled
from infer.save import refuse_mixture, save_beside
from infer.several import Trained

Part = tuple[Pair, float]  # an adapter's pair and the weight it is on with


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


def merged(weight: Tensor, parts: list[Part]) -> Tensor:
    """W [out, in] in fp32 with the updates in it."""
    for pair, amount in parts:
        update = pair.strength * (pair.up.float() @ pair.down.float())
        if pair.magnitude is not None:
            whole = weight + update
            update = whole * (pair.magnitude.float() / whole.norm(dim=1))[:, None] - weight
        weight = weight + amount * update
    return weight


def write_transformer(options: Merge, originals: Originals, parts: dict[str, list[Part]], folder: Path,
                      device: torch.device) -> list[Kept]:  # fmt: skip
    """The merged transformer, one shard in memory at a time; returns what is left of each layer's update."""
    import diffusers

    config, layers = read_config(options.model, "transformer"), linear_layers(empty_transformer(options.model))
    precision, kept = options.precision, []
    index: dict[str, str] = {}
    skipped = [f".{name}." for name in precision.skip_modules]
    folder.mkdir()
    bar = tqdm(total=sum(map(len, originals.shards.values())), unit="tensor", desc="merging")
    for file, names in originals.shards.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            value, layer = originals.tensors[name], name.removesuffix(".weight")
            own = parts.get(layer, []) if name.endswith(".weight") else []
            linear = layer in layers and name.endswith(".weight")
            quantize = linear and precision.quantized and not any(skip in f".{layer}." for skip in skipped)
            exact = merged(value.float(), own) if own else value
            if own:
                kept.append(kept_of(layer, value.float(), exact, precision if quantize else None, precision, device))
            if quantize:
                state = quantized_layer(exact, precision, device).state_dict(prefix=f"{layer}.")
                shard |= {key: tensor.cpu().contiguous() for key, tensor in state.items()}
            else:
                shard[name] = exact.to(precision.dtype)
            bar.update()
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    bar.close()
    if precision.quantized:
        made: Any = quantization_config(precision, diffusers, layers)
        config |= {"quantization_config": made.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if len(originals.shards) > 1:
        total = sum((folder / file).stat().st_size for file in originals.shards)
        body = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(body, indent=2) + "\n")
    return kept


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
    chosen = options.adapter.all()
    if not chosen:
        raise ValueError("adapter.path is null; give the LoRA file to merge, more of them as adapter.also=[{path:b}]")
    if not options.out or Path(options.out).exists():
        raise ValueError(f"out is {options.out!r}; give a folder that does not exist yet")
    check_model(options.model)
    device, out = pick_device(options.device), Path(options.out)
    check_guidance(options.model, {"sampling.guidance": (options.sampling.guidance, Sampling().guidance)})
    empty = empty_transformer(options.model)
    check_precision(options.model, options.precision, device, empty)
    parts: dict[str, list[Part]] = {}
    for one in chosen:
        pairs = read_pairs(one.path)
        check_fit(pairs, empty, one.path)
        for layer, pair in settled(empty, one.path, pairs, None)[0].items():
            parts.setdefault(layer, []).append((pair, one.weight))
    if any(len(own) > 1 and any(pair.magnitude is not None for pair, _ in own) for own in parts.values()):
        raise ValueError("DoRA is merged alone: its magnitude says nothing of a sum with another adapter")
    if "quantization_config" in read_config(options.model, "transformer"):
        loss = straight_loss(load_transformer(options.model, options.precision, device), parts, options.precision)
        raise ValueError(
            f"{options.model.path} is quantized already: merged straight into it, {100 * loss:.0f} % of the update "
            "would be rounded away (measured on its layers); give the unquantized checkpoint as model.path"
        )
    originals = Originals(options.model)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
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
