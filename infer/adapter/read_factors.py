"""LoKr, LoHa and OFT in a file as their own factors, by diffusers' names of the layers."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from infer.adapter.contents import Contents
from infer.adapter.factors import NAMES, Factors, Parts, block_size, kind_of_parts
from infer.adapter.file_family import file_family
from infer.adapter.layer_names import families_with, layers_of
from infer.adapter.lycoris import MOST, dim_of, matrices
from infer.family.family import Family, Linear

PEFT_CONFIG = "adapter_config.json"


def factors_in(contents: Contents, model: Container[str] | None) -> Factors:
    """The factors of a file of one kind.

    Raises:
        ValueError: it holds several kinds, a part is absent or of another shape, or LoKr and LoHa are of layers that
            diffusers has cut in several.
    """
    file, _, keys, found = contents
    kinds = {kind_of_parts(parts) for parts in found.values()}
    kind = next(iter(kinds))
    if len(kinds) > 1 or kind is None:
        names = " and ".join(sorted(NAMES[each or "lora"] for each in kinds))
        raise ValueError(f"{file} is {names} in one; save the one that is meant alone")
    if any("magnitude" in parts for parts in found.values()):
        raise ValueError(f"{file} is {NAMES[kind]} with DoRA's magnitude, which is not read; train it without")
    parts = {name: matrices(file, name, found[name]) for name in sorted(found)}
    shapes = {name: _shape(file, name, kind, parts[name]) for name in parts}
    family = file_family(file, shapes, model) if kind != "oft" else _oft_family(list(parts), model)
    settings = peft_settings(file, keys)
    series = settings.get("use_cayley_neumann", True), settings.get("num_cayley_neumann_terms", 5)
    if kind == "oft" and series != (True, 5):
        raise ValueError(
            f"{file} is OFT by another form of Cayley's transform ({PEFT_CONFIG}) than the series of five terms, which "
            "alone is read; merge it with PEFT, and give the merged weights as model.path"
        )
    layers: dict[str, Parts] = {}
    strengths: dict[str, float] = {}
    for name, own in parts.items():
        named = layers_of(name, family)
        if len(named) > 1 and kind != "oft":
            raise ValueError(
                f"{file} adds an update of a rank above {MOST} to {name}, which diffusers has as {len(named)} layers; "
                "merge it into the weights with the program that made it, and give those as model.path"
            )
        for layer in named:
            layers[layer] = own
            strengths[layer] = 1.0 if kind == "oft" else _strength(file, name, found[name], settings)
    if not any(strengths[layer] and _does_something(kind, own) for layer, own in layers.items()):
        raise ValueError(f"{file} is zero in every layer: it would draw the base model; train it again")
    return Factors(kind, layers, strengths)


def shape_of(parts: Parts) -> Linear:
    """Rows and columns of the layer; OFT's rows are not known: 0."""
    if "oft_R.weight" in parts:
        blocks, entries = parts["oft_R.weight"].shape
        return Linear(0, blocks * block_size(entries))
    if "hada_w1_a" in parts:
        return Linear(parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])
    up, down = ([parts[w] if w in parts else parts[f"{w}_{end}"] for w in ("lokr_w1", "lokr_w2")] for end in ("a", "b"))
    return Linear(up[0].shape[0] * up[1].shape[0], down[0].shape[1] * down[1].shape[1])


def _shape(file: Path, name: str, kind: str, parts: Parts) -> Linear:
    try:
        shape = shape_of(parts)
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]} for {name}: copy or train it again") from error
    if kind == "oft":
        entries = parts["oft_R.weight"].shape[1]
        size = block_size(entries)
        if size * (size - 1) != 2 * entries:
            raise ValueError(
                f"{file}: oft_R of {name} has {entries} numbers a block, which no block has; copy it again"
            )
    return shape


def _oft_family(names: list[str], model: Container[str] | None) -> Family:
    families = families_with(names)
    there = [f for f in families if all(layer in (model or ()) for name in names for layer in layers_of(name, f))]
    return (there or families)[0]


def _strength(file: Path, name: str, parts: Parts, settings: dict[str, Any]) -> float:
    alpha, dim = parts.get("alpha"), dim_of(parts)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{file} does not say how strong {name} is (alpha has {alpha.numel()} values); train it again")
    if settings:
        return peft_strength(file, settings)
    return 1.0 if dim is None or alpha is None else float(alpha) / dim


def peft_strength(file: Path, settings: dict[str, Any]) -> float:
    """alpha / r of PEFT's configuration of LoKr or LoHa.

    Raises:
        ValueError: it does not say, or says it of each layer.
    """
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise ValueError(f"{file} has ranks or alphas of single layers in {PEFT_CONFIG}, which are not read; merge it")
    try:
        return float(settings["alpha"]) / float(settings["r"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file.with_name(PEFT_CONFIG)} does not say how strong it is ({error})") from error


def peft_settings(file: Path, keys: list[str]) -> dict[str, Any]:
    """PEFT's configuration beside a file in its names; empty for other files."""
    beside = file.with_name(PEFT_CONFIG)
    if not any(key.startswith("base_model.model.") for key in keys):
        return {}
    if not beside.is_file():
        raise ValueError(f"{file} is PEFT's, whose strength stands in {PEFT_CONFIG}; put that file beside it")
    try:
        settings = json.loads(beside.read_text(errors="replace"))
        settings.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"the configuration in {beside} is no JSON object; save the adapter again") from error
    return dict(settings)


def _does_something(kind: str, parts: Parts) -> bool:
    return (any if kind == "oft" else all)(bool(value.any()) for value in parts.values())
