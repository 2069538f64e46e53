"""The transformer of a checkpoint with adapters merged into it, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.checkpoint.originals import Originals
from infer.merging.report import Kept, kept_of
from infer.merging.update import Part, merged
from infer.quantize.layer import quantized_layer
from infer.quantize.precision import Precision, kind_asked
from infer.quantize.quantizer import quantization_config


def write_transformer(
    model: Model,
    precision: Precision,
    originals: Originals,
    parts: dict[str, list[Part]],
    folder: Path,
    device: torch.device,
) -> list[Kept]:
    """The merged transformer, one shard in memory at a time; returns what is left of each layer's update."""
    import diffusers

    config = read_config(model, "transformer")
    layers = linear_shapes(config)
    kept = []
    index: dict[str, str] = {}
    folder.mkdir()
    bar = tqdm(total=sum(map(len, originals.shards.values())), unit="tensor", desc="merging")
    for file, names in originals.shards.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            value, layer = originals.tensors[name], name.removesuffix(".weight")
            updates = parts.get(layer, []) if name.endswith(".weight") else []
            linear = layer in layers and name.endswith(".weight")
            quantize = linear and kind_asked(precision, layer) is not None
            exact = merged(value.float(), updates) if updates else value
            stored = exact.to(precision.dtype)
            if not stored.isfinite().all():
                raise ValueError(_not_finite(name, precision, bool(updates)))
            if updates:
                kept.append(kept_of(layer, value.float(), exact, precision if quantize else None, precision, device))
            if quantize:
                state = quantized_layer(exact, precision, device).state_dict(prefix=f"{layer}.")
                shard |= {key: tensor.cpu().contiguous() for key, tensor in state.items()}
            else:
                shard[name] = stored
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


def _not_finite(name: str, precision: Precision, adapted: bool) -> str:
    if adapted:
        mend = "lower adapter.weight, or copy the checkpoint again if it is damaged"
        return f"{name} with the adapters in it is not finite in {precision.dtype_name}; {mend}"
    return f"{name} of the checkpoint is not finite in {precision.dtype_name}; copy it again"
