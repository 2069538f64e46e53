"""Adapters that start from the quantization error: Q + strength x B A is near W before the first step.

residual: B A is the best approximation of W - Q of its rank, Q as it is (as PEFT's `replace_lora_weights_loftq`, which
knows PeftModel and CUDA alone). loftq: Q is rounded again around B A, and so on in turn (LoftQ, Li et al. 2023,
algorithm 1).

What such an adapter starts with is kept beside it as start.safetensors: LoftQ's Q is made again from it, and on another
precision than the adapter's own, where there is nothing to make up for, it is taken off.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from infer.attached import strengths
from infer.flux import Model
from infer.formats import Pair, Pairs, find_adapter, read_notes, read_pairs
from infer.formats_write import scaled, write_pairs
from infer.originals import Originals
from infer.quantize import Precision, dequantized, kind_of
from infer.requantize import quantized_layer
from infer.targets import base_layers

START = "start.safetensors"
TURNS = 5  # LoftQ's T in the paper's experiments


def best(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the closest B A in Frobenius norm (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def start_from_error(
    transformer: FluxTransformer2DModel, model: Model, precision: Precision, init: str, name: str = "default"
) -> Pairs:
    """Fill an attached adapter, for loftq quantize its layers again, and return what it starts with.

    Raises:
        ValueError: the layers are not quantized, the checkpoint holds no unquantized weights, or double quantization
            is asked of loftq.
    """
    if not precision.quantized:
        raise ValueError(f"adapter.init={init} starts from a quantization error, but precision is {precision.kind}")
    originals, pairs = Originals(model), {}
    for layer, strength in strengths(transformer, name).items():
        module: Any = transformer.get_submodule(layer)
        if kind_of(module.base_layer) is None:
            raise ValueError(f"adapter.init={init}: {layer} is not quantized; leave it out of adapter.targets")
        stored = dequantized(module.base_layer)
        exact = originals.weight(layer).to(stored.device)
        rank = module.r[name]
        down, up = best(exact - stored, rank)
        if init == "loftq":
            for _ in range(TURNS - 1):
                requantize(module.base_layer, exact - up @ down, precision)
                down, up = best(exact - dequantized(module.base_layer), rank)
            # the last Q, around what start.safetensors holds: so it is found again
            requantize(module.base_layer, exact - up @ down, precision)
        module.lora_A[name].weight.data.copy_(down)
        module.lora_B[name].weight.data.copy_(up / strength)
        pairs[layer] = Pair(down.float().cpu(), up.float().cpu(), 1.0)
    return pairs


def requantize(layer: nn.Linear, weight: Tensor, precision: Precision) -> None:
    """Put other rounded weights in a layer's place, in the memory that the fast path reads too.

    Raises:
        ValueError: the constants are quantized themselves.
    """
    new: Any = quantized_layer(weight, precision, layer.weight.device)
    old: Any = layer
    fresh, there = new.weight, old.weight
    if precision.double_quant:
        raise ValueError("adapter.init=loftq quantizes layers again, which precision.double_quant does not allow here")
    there.data.copy_(fresh.data.view(there.data.shape))
    if precision.kind == "int8":
        scales = there.SCB if there.SCB is not None else old.state.SCB
        scales.copy_(fresh.SCB)
    else:
        there.quant_state.absmax.copy_(fresh.quant_state.absmax)


def minus(pairs: Pairs, start: Pairs) -> Pairs:
    """The pairs less others, of twice the rank."""
    whole = {}
    for layer, pair in pairs.items():
        off = start[layer]
        ups = scaled(pair.up.float(), pair.strength), -scaled(off.up.float(), off.strength)
        whole[layer] = Pair(torch.cat([pair.down.float(), off.down.float()]), torch.cat(ups, 1), 1.0)
    return whole


def settled(transformer: FluxTransformer2DModel, path: str, pairs: Pairs, model: Model | None) -> Pairs:
    """An adapter's pairs as they are right on this transformer; for loftq on its own precision, its layers are
    quantized again. Adapters that start from no error are as they are.

    Raises:
        ValueError: start.safetensors is not beside the adapter, or `model` is not given where it is needed.
    """
    file = find_adapter(path)
    notes: dict[str, Any] = read_notes(file)
    init = notes.get("adapter", {}).get("init")
    if init not in ("residual", "loftq"):
        return pairs
    if not file.with_name(START).is_file():
        raise ValueError(f"{file} starts from a quantization error and needs {START} beside it; copy its whole folder")
    start = read_pairs(str(file.with_name(START)))
    precision = Precision(**notes["precision"])
    layers = base_layers(transformer)
    if any(kind_of(layers[layer]) != precision.kind for layer in pairs):
        return minus(pairs, start)
    if "recovery" in getattr(transformer, "peft_config", {}):
        raise ValueError(f"{file} makes up for quantization itself (init={init}); leave the recovery adapter out")
    if init == "loftq":
        if model is None:
            raise ValueError(
                f"{file} is of adapter.init=loftq: its base is made from the checkpoint, which is not known"
            )
        originals = Originals(model)
        for layer, pair in start.items():
            exact = originals.weight(layer).to(layers[layer].weight.device)
            requantize(layers[layer], exact - (pair.up @ pair.down).to(exact.device), precision)
    return pairs


def save_start(pairs: Pairs, folder: Path) -> None:
    """Keep beside an adapter what it started with."""
    write_pairs(pairs, "diffusers", folder / START, {})
