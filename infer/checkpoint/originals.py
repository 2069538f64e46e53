"""A checkpoint's own unquantized weights, read from its shards when they are needed: never all of them at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor

from infer.checkpoint.family import family_of
from infer.checkpoint.files import part_folder, read_config
from infer.checkpoint.headers import SINGLE
from infer.checkpoint.model import Model
from infer.checkpoint.sources import file_of
from infer.single_file.weights import Weights, transformer_weights

SHARD = 4 * 2**30  # bytes in bf16


def check_unquantized(model: Model) -> None:
    """Raises:
    ValueError: the checkpoint holds no unquantized weights.
    """
    mend = "give the unquantized checkpoint as model.path"
    if model.random:
        raise ValueError(f"model.weights=random has no weights to go back to; {mend}")
    if "quantization_config" in read_config(model, "transformer"):
        raise ValueError(f"{model.path} is quantized itself; {mend}")


class Originals:
    """The transformer's tensors by name, each read from its shard on demand."""

    def __init__(self, model: Model) -> None:
        """Raises:
        ValueError: the checkpoint holds no unquantized weights.
        """
        check_unquantized(model)
        file = file_of(model, "transformer")
        if file is not None:
            weights = transformer_weights(file, read_config(model, "transformer"), torch.device("cpu"))
            self.tensors: Mapping[str, Tensor] = weights
            self.shards: dict[str, list[str]] = _shards(weights)
            return
        folder = part_folder(model, "transformer")
        index = folder / f"{SINGLE}.index.json"
        self.shards = {}  # names by shard, in the checkpoint's order
        if index.is_file():
            for name, file in json.loads(index.read_text())["weight_map"].items():
                self.shards.setdefault(file, []).append(name)
        elif (folder / SINGLE).is_file():
            from safetensors import safe_open

            with safe_open(folder / SINGLE, framework="pt") as reader:
                self.shards[SINGLE] = list(reader.keys())
        else:
            raise ValueError(f"{folder} holds neither {SINGLE} nor its index; copy the whole checkpoint")
        files = {name: Path(folder) / file for file, names in self.shards.items() for name in names}
        self.tensors = OffloadedWeightsLoader(
            index={name: {"safetensors_file": str(file), "weight_name": name} for name, file in files.items()}
        )

    def weight(self, layer: str) -> Tensor:
        """A linear layer's weight [out, in] in fp32."""
        value: Tensor = self.tensors[f"{layer}.weight"]
        return value.float()


def _shards(weights: Weights) -> dict[str, list[str]]:
    """A single file's tensors in shards of about 4 GiB, with the names that diffusers gives them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in weights:
        count = 2 * weights.numel(name)
        if groups[-1] and size + count > SHARD:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    stem = SINGLE.removesuffix(".safetensors")
    return {f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def transformer_from_shards(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The unquantized transformer, each block read from its shard for the time of its forward pass. So a 24 GB card
    runs FLUX.1-dev in bf16; a pass takes as long as the disk, or the system's cache of it, takes to be read."""
    originals = Originals(model)
    with init_empty_weights():
        cls = getattr(diffusers, family_of(model).TRANSFORMER)
        transformer = cls.from_config(read_config(model, "transformer")).to(dtype)
    blocks = {"transformer_blocks": transformer.transformer_blocks}
    blocks["single_transformer_blocks"] = transformer.single_transformer_blocks
    parts = {f"{kind}.{i}": block for kind, several in blocks.items() for i, block in enumerate(several)}
    parts |= {name: part for name, part in transformer.named_children() if name not in blocks}
    for name, part in parts.items():
        if not list(part.parameters()):
            continue
        weights = PrefixedDataset(originals.tensors, f"{name}.")
        hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(part, hook)
    return transformer.eval().requires_grad_(False)
