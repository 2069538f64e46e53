"""PEFT's tuners of LoKr, LoHa and OFT on a transformer's layers, quantized ones too.

PEFT makes the parameters, names them and switches them. What a layer computes is said here: PEFT's LoKr and LoHa form
the whole update [out, in] and shape it like the stored weight, which of a 4-bit layer is packed. LoKr is multiplied
factor by factor, OFT turns the layer's input; LoHa has no shorter way than the whole update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig
from peft.tuners.loha.layer import make_weight
from torch import Tensor, nn
from torch.nn.functional import linear

from infer.adapter.factors import Factors, Parts, block_size, product, turn, turned
from infer.adapter.targets import base_layers
from infer.quantize.compute import is_adapters

HOLDERS = {
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "oft": ("oft_R",),
}
"""PEFT's dictionaries of each kind's parameters, by adapter."""


def pattern_of(layers: Mapping[str, object]) -> str:
    """PEFT takes each name of a list for an ending, and `proj_out` ends many: one pattern of whole names."""
    return "|".join(map(re.escape, layers))


def config_of(kind: str, rank: int, alpha: float, factor: int, block: int, layers: Mapping[str, object]) -> PeftConfig:
    """PEFT's configuration; factor: LoKr's, of w1; block: OFT's size of a block."""
    targets = pattern_of(layers)
    if kind == "oft":
        return OFTConfig(oft_block_size=block, use_cayley_neumann=True, target_modules=targets)
    if kind == "loha":
        return LoHaConfig(r=rank, alpha=alpha, target_modules=targets)
    return LoKrConfig(r=rank, alpha=alpha, decompose_factor=factor, target_modules=targets)


def attach_tuner(transformer: Any, config: PeftConfig, name: str) -> list[nn.Parameter]:
    """Add an adapter, on and in fp32; returns its parameters.

    Raises:
        ValueError: an adapter of another kind is there.
    """
    others = {str(other.peft_type.value) for other in getattr(transformer, "peft_config", {}).values()}
    if others - {str(config.peft_type.value)}:
        raise ValueError(
            f"a {config.peft_type.value} adapter cannot be beside one of {', '.join(sorted(others))}; run it alone"
        )
    with whole_shapes(transformer):
        transformer.add_adapter(config, adapter_name=name)
    for module in _layers(transformer, name).values():
        module.forward = MethodType(_forward, module)
        if config.peft_type == "OFT":
            module.scaling = {}  # which PEFT's own `set_scale` reads, and its OFT lacks
    found = [p for key, p in transformer.named_parameters() if is_adapters(key) and name in key.split(".")]
    for parameter in found:
        parameter.data = parameter.data.float()
    return found


@contextmanager
def whole_shapes(transformer: nn.Module) -> Iterator[None]:
    """Within, each packed weight is a view of one number in the shape [out, in], from which PEFT takes LoHa's."""
    kept = {}
    for layer in base_layers(transformer).values():
        shape = layer.out_features, layer.in_features
        if tuple(layer.weight.shape) != shape:
            kept[layer] = layer.weight
            one = torch.zeros((), device=layer.weight.device).expand(shape)
            layer.weight = nn.Parameter(one, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in kept.items():
            layer.weight = weight


def parts_of(module: Any, name: str) -> Parts:
    """The factors that a layer has of an adapter, as they are."""
    found = {}
    for names in HOLDERS.values():
        for holder in names:
            there = getattr(module, holder, {})
            if name in there:
                found.update({"oft_R.weight": there[name].weight} if holder == "oft_R" else {holder: there[name]})
    return found


def _layers(transformer: nn.Module, name: str) -> dict[str, Any]:
    """The layers that an adapter is on, by diffusers' names."""
    return {layer: module for layer, module in transformer.named_modules() if parts_of(module, name)}


def kind_attached(transformer: Any, name: str) -> str:
    """lora, lokr, loha or oft."""
    return str(transformer.peft_config[name].peft_type.value).lower()


def attached_layers(transformer: nn.Module, name: str = "default") -> dict[str, float]:
    """The strength in every layer of an adapter that is no LoRA, its weight included."""
    return {
        layer: float(getattr(module, "scaling", {}).get(name, 1.0))
        for layer, module in _layers(transformer, name).items()
    }


def factors_of(transformer: nn.Module, name: str = "default") -> Factors:
    """An attached adapter that is no LoRA, on the CPU."""
    layers = _layers(transformer, name)
    parts = {
        layer: {
            part: value.detach().to("cpu", copy=True).contiguous() for part, value in parts_of(module, name).items()
        }
        for layer, module in layers.items()
    }
    return Factors(kind_attached(transformer, name), parts, attached_layers(transformer, name))


def set_factors(transformer: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Put an adapter's tensors back, by layer and part."""
    with torch.no_grad():
        for layer, module in _layers(transformer, name).items():
            for part, parameter in parts_of(module, name).items():
                parameter.copy_(state[f"{layer}.{part}"])


def put_factors(transformer: Any, factors: Factors, name: str, dtype: torch.dtype) -> None:
    """Attach factors that fit as a frozen adapter, on and alone; OFT's in fp32, as turns are near 1.

    Raises:
        ValueError: an adapter of another kind is there.
    """
    first = next(iter(factors.layers.values()))
    block = block_size(first["oft_R.weight"].shape[1]) if factors.kind == "oft" else 0
    config = config_of(factors.kind, 1, 1.0, 1, block, factors.layers)
    attach_tuner(transformer, config, name)
    layers = _layers(transformer, name)
    assert layers.keys() == factors.layers.keys(), f"{len(layers)} of {len(factors.layers)} layers were attached"
    for layer, parts in factors.layers.items():
        module = layers[layer]
        device = next(iter(parts_of(module, name).values())).device
        if factors.kind == "oft":
            module.oft_R[name].weight = nn.Parameter(parts["oft_R.weight"].float().to(device), requires_grad=False)
            continue
        for holder in HOLDERS[factors.kind]:
            there = getattr(module, holder)
            if name in there:
                del there[name]
            if holder in parts:
                there[name] = nn.Parameter(parts[holder].to(device, dtype), requires_grad=False)
        module.alpha[name], module.r[name] = factors.strengths[layer], 1
        module.scaling[name] = factors.strengths[layer]


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer with its adapters that are on, [..., in] -> [..., out]."""
    if module.disable_adapters:
        result: Tensor = module.base_layer(x, *args, **kwargs)
        return result
    on = [(name, parts) for name in module.active_adapters if (parts := parts_of(module, name))]
    given = x
    for _, parts in on:
        if "oft_R.weight" in parts:
            given = turned(given, _wide(x, turn, parts["oft_R.weight"]).to(given.dtype))
    result = module.base_layer(given, *args, **kwargs)
    for name, parts in on:
        if "oft_R.weight" not in parts:
            added = _lokr(x, parts) if "hada_w1_a" not in parts else _loha(x, parts)
            result = result + (module.scaling[name] * added).to(result.dtype)
    return result


def _wide(x: Tensor, function: Any, *tensors: Tensor) -> Tensor:
    """A function of small tensors in fp32, within autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = function(*(tensor.float() for tensor in tensors))
    return result


def _lokr(x: Tensor, parts: Parts) -> Tensor:
    """(w1 x w2) x, x being the Kronecker product: w1 X w2^T for X, the rows of x cut into a matrix [c, d]."""
    w1 = product(parts, "lokr_w1").to(x.dtype)
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"].to(x.dtype)
        given = linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)
    else:
        up, down = (parts[f"lokr_w2_{end}"].to(x.dtype) for end in "ab")
        given = linear(linear(x.unflatten(-1, (w1.shape[1], down.shape[1])), down), up)
    return (w1 @ given).flatten(-2)


def _loha(x: Tensor, parts: Parts) -> Tensor:
    one = torch.ones((), device=x.device)
    whole = _wide(x, lambda *given: make_weight(*given, one), *(parts[name] for name in HOLDERS["loha"]))
    return linear(x, whole.to(x.dtype))
