"""Adapters that start from the quantization error: Q + strength x B A is near W before the first step.

residual: B A is the best approximation of W - Q of its rank, Q as it is (as PEFT's `replace_lora_weights_loftq`, which
knows PeftModel and CUDA alone). loftq: Q is rounded again around B A, and so on in turn (LoftQ, Li et al. 2023,
algorithm 1).

What such an adapter starts with is kept beside it as start.safetensors. LoftQ's Q is made again from it. On another
precision than the adapter's own there is nothing to make up for, and it is subtracted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infer.adapter.attached import strengths
from infer.adapter.lora import FROM_ERROR
from infer.adapter.read import Pair, Pairs, find_adapter, read_notes, read_pairs
from infer.adapter.targets import base_layers
from infer.adapter.write import scaled, write_pairs
from infer.checkpoint.model import Model
from infer.checkpoint.originals import Originals
from infer.quantize.compute import NAMES, is_adapters
from infer.quantize.layer import quantized_layer
from infer.quantize.precision import Precision, kind_asked, kind_of
from infer.quantize.storage import dequantized

START = "start.safetensors"
TURNS = 5  # LoftQ's T in the paper's experiments


def best(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the closest B A in Frobenius norm (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


class Start(NamedTuple):
    """What an adapter began with, for each layer whose quantization error it makes up for."""

    init: str  # residual or loftq
    here: Pairs  # of layers stored here as they were in training: the error is here too
    elsewhere: Pairs  # of the others: there is nothing to make up for


def start_from_error(transformer: Any, model: Model, init: str, name: str = "default") -> Start:
    """Fill an attached adapter, for loftq quantize its layers again, and return what it starts with.

    Of a mixture, layers that are not quantized have no error: they keep the default initialisation.

    Raises:
        ValueError: none of the adapted layers is quantized, or the checkpoint holds no unquantized weights.
    """
    originals, pairs = Originals(model), {}
    for layer, strength in strengths(transformer, name).items():
        module: Any = transformer.get_submodule(layer)
        if kind_of(module.base_layer) is None:
            continue
        stored = dequantized(module.base_layer)
        exact = originals.weight(layer).to(stored.device)
        rank = module.r[name]
        down, up = best(exact - stored, rank)
        if init == "loftq":
            for _ in range(TURNS - 1):
                requantize(module.base_layer, exact - up @ down, stored_dtype(transformer))
                down, up = best(exact - dequantized(module.base_layer), rank)
            # the last Q, around what start.safetensors holds: so it is found again
            requantize(module.base_layer, exact - up @ down, stored_dtype(transformer))
        module.lora_A[name].weight.data.copy_(down)
        module.lora_B[name].weight.data.copy_(up / strength)
        pairs[layer] = Pair(down.float().cpu(), up.float().cpu(), 1.0)
    if not pairs:
        raise ValueError(nothing_quantized(init))
    return Start(init, pairs, {})


def stored_dtype(transformer: nn.Module) -> torch.dtype:
    """What a quantized transformer's other weights are stored in. diffusers' `dtype` may name an adapter's, in a model
    without biases."""
    stored = (p.dtype for name, p in transformer.named_parameters() if p.is_floating_point() and not is_adapters(name))
    return next(stored)


def nothing_quantized(init: str) -> str:
    return (
        f"adapter.init={init} starts from a quantization error, but none of the layers that adapter.targets names is "
        "quantized; set adapter.init=default, or choose another precision"
    )


def requantize(layer: nn.Linear, weight: Tensor, dtype: torch.dtype) -> None:
    """Put other rounded weights [out, in] in a layer's place, in the memory that the fast path reads too.

    dtype: that the weight is rounded from, as in loading.
    """
    there: Any = layer.weight
    kind, old = kind_of(layer), getattr(there, "quant_state", None)
    assert kind is not None
    nested = old is not None and bool(old.nested)
    new: Any = quantized_layer(weight, Precision(kind, NAMES[dtype], nested), there.device)
    there.data.copy_(new.weight.data.view(there.data.shape))
    if old is None:
        state: Any = layer
        (there.SCB if there.SCB is not None else state.state.SCB).copy_(new.weight.SCB)
        return
    fresh = new.weight.quant_state
    old.absmax.copy_(fresh.absmax)
    if old.nested:
        old.state2.absmax.copy_(fresh.state2.absmax)
        old.offset.copy_(fresh.offset)


def minus(pairs: Pairs, start: Pairs) -> Pairs:
    """The pairs less others where there are any, of twice the rank there."""
    whole = dict(pairs)
    for layer in pairs.keys() & start.keys():
        pair, off = pairs[layer], start[layer]
        ups = scaled(pair.up.float(), pair.strength), -scaled(off.up.float(), off.strength)
        whole[layer] = Pair(torch.cat([pair.down.float(), off.down.float()]), torch.cat(ups, 1), 1.0)
    return whole


def read_start(path: str, kinds: Callable[[str], str | None]) -> Start | None:
    """What an adapter's file began with; None if that was no quantization error.

    kinds: how a layer is stored here (int8, fp4, nf4 or None), by its name.

    Raises:
        ValueError: start.safetensors is not beside the adapter.
    """
    file = find_adapter(path)
    notes: dict[str, Any] = read_notes(file)
    init = notes.get("adapter", {}).get("init")
    if init not in FROM_ERROR:
        return None
    if not file.with_name(START).is_file():
        raise ValueError(f"{file} starts from a quantization error and needs {START} beside it; copy its whole folder")
    trained = Precision(**notes["precision"])
    start = read_pairs(str(file.with_name(START)))
    alike = {layer for layer in start if kinds(layer) == kind_asked(trained, layer)}
    here, elsewhere = ({k: start[k] for k in start if (k in alike) is own} for own in (True, False))
    return Start(init, here, elsewhere)


def kinds_of(transformer: nn.Module) -> Callable[[str], str | None]:
    """How a transformer's layers are stored, by their names."""
    layers = base_layers(transformer)
    return lambda layer: kind_of(layers[layer]) if layer in layers else None


def settled(
    transformer: Any, path: str, pairs: Pairs, model: Model | None, alone: bool = True
) -> tuple[Pairs, Start | None]:
    """An adapter's pairs as this transformer needs them, and the start that is still in them, if there is one; loftq's
    layers are quantized again around it. Adapters that did not start from an error are returned unchanged.

    alone: nothing else makes up for the quantization, and the adapter is on at weight 1. Else what it began with is
    taken off: what it has learned is left.

    Raises:
        ValueError: start.safetensors is not beside the adapter, or `model` is not given where it is needed.
    """
    start = read_start(path, kinds_of(transformer))
    if start is None:
        return pairs, None
    if not alone:
        return minus(pairs, start.here | start.elsewhere), None
    if start.init == "loftq" and start.here:
        if model is None:
            raise ValueError(
                f"{path} is of adapter.init=loftq: its base is made from the checkpoint, which is not known"
            )
        layers, originals = base_layers(transformer), Originals(model)
        for layer, pair in start.here.items():
            exact = originals.weight(layer).to(layers[layer].weight.device)
            requantize(layers[layer], exact - (pair.up @ pair.down).to(exact.device), stored_dtype(transformer))
    return minus(pairs, start.elsewhere), start if start.here else None


def round_again(transformer: Any, start: Start, model: Model) -> None:
    """Undo what `settled` did to the layers of an adapter of loftq: they are as they were loaded."""
    layers, originals = base_layers(transformer), Originals(model)
    for layer in start.here if start.init == "loftq" else ():
        requantize(layers[layer], originals.weight(layer).to(layers[layer].weight.device), stored_dtype(transformer))


def save_start(pairs: Pairs, folder: Path) -> None:
    """Keep beside an adapter what it started with."""
    write_pairs(pairs, "diffusers", folder / START, {})
