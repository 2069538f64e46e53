"""Adapters and a checkpoint -> the folder of the merged one, with what is left of each update beside it."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from infer.adapter.error_init import settled
from infer.adapter.factors import Factors
from infer.adapter.fit import check_alone, fitting_adapter
from infer.adapter.read import Pair
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import load_transformer
from infer.checkpoint.originals import Originals
from infer.checkpoint.save import save_beside
from infer.family.find import of_config
from infer.merging.report import compare_pictures, report, straight_loss
from infer.merging.settings import Merge
from infer.merging.shards import write_transformer
from infer.merging.update import Factored, Part
from infer.program.atomic import clear_partials, partial_of, sync_folder, sync_tree


def merge_checkpoint(options: Merge, device: torch.device) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: an adapter does not fit, or the checkpoint is quantized already.
    """
    config, out = read_config(options.model, "transformer"), Path(options.out)
    chosen = options.adapter.all()
    parts = _parts(options, config)
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
        kept = write_transformer(options.model, options.precision, originals, parts, partial / "transformer", device)
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


def _parts(options: Merge, config: dict[str, Any]) -> dict[str, list[Part]]:
    """The adapters' pairs by layer, each with the weight that it is merged with."""
    layers = linear_shapes(config)
    read = [(one, fitting_adapter(one.path, layers)) for one in options.adapter.all()]
    with init_empty_weights():
        empty = getattr(diffusers, of_config(config).TRANSFORMER).from_config(config)
    parts: dict[str, list[Part]] = {}
    for one, pairs in read:
        if isinstance(pairs, Factors):
            check_alone(one.path, pairs, len(read), one.weight)
            found = {layer: Factored(own, pairs.strengths[layer]) for layer, own in pairs.layers.items()}
            return {layer: [(each, one.weight)] for layer, each in found.items()}
        for layer, pair in settled(empty, one.path, pairs, None)[0].items():
            parts.setdefault(layer, []).append((pair, one.weight))
    if any(len(those) > 1 and any(isinstance(pair, Pair) and pair.magnitude is not None for pair, _ in those)
           for those in parts.values()):  # fmt: skip
        raise ValueError("DoRA is merged alone: its magnitude says nothing of a sum with another adapter")
    return parts
