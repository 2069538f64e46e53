"""An adapter's file for a model: its pairs, which have to fit the model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from infer.adapter.contents import read_contents
from infer.adapter.factors import NAMES, Factors, Parts, factors_of_state, kind_of_parts
from infer.adapter.layer_names import families_with
from infer.adapter.own_checkpoint import is_checkpoint, read_checkpoint
from infer.adapter.read import Pairs, find_adapter, no_lora, read_adapter
from infer.adapter.read_factors import factors_in, shape_of
from infer.checkpoint.layers import linear_shapes
from infer.family.family import Linear
from infer.family.find import SIZES

if TYPE_CHECKING:
    from infer.adapter.lora import Adapter


def fitting_pairs(path: str, layers: Mapping[str, Linear]) -> Pairs:
    """Read an adapter file of any format for a model with these linear layers, by diffusers' names, as pairs.

    Raises:
        ValueError: it cannot be read, or not as pairs; a layer is unknown to the model, or has other features.
    """
    found = fitting_adapter(path, layers)
    if isinstance(found, Factors):
        raise ValueError(f"{path} is {no_lora(found)}, which is needed here; give one of LoRA")
    return found


def fitting_adapter(path: str, layers: Mapping[str, Linear]) -> Pairs | Factors:
    """Likewise, an adapter that cannot be pairs as its own factors.

    Raises:
        ValueError: it cannot be read, a layer is unknown to the model, or has other features.
    """
    found = read_adapter(path, model=layers)
    if isinstance(found, Factors):
        _check_factors(path, found, layers)
        return found
    pairs = found
    unknown = [layer for layer in pairs if layer not in layers]
    if unknown:
        raise ValueError(
            f"{path} does not fit this model: {len(unknown)} of {len(pairs)} layers are unknown to it "
            f"({unknown[0]}, ...); {_mend(pairs)}"
        )
    for name, pair in pairs.items():
        shape, layer = _shape(pairs, name), layers[name]
        if shape != layer:
            raise ValueError(
                f"{path} does not fit this model at {name}: it maps {shape.columns} to {shape.rows} features where the "
                f"layer maps {layer.columns} to {layer.rows}; {_mend(pairs)}"
            )
        if pair.magnitude is not None and pair.magnitude.numel() != layer.rows:
            raise ValueError(
                f"{path} does not fit this model at {name}: DoRA's magnitude has {pair.magnitude.numel()} numbers for "
                f"{layer.rows} rows; copy or train it again"
            )
    return pairs


def fitting_factors(path: str, layers: Mapping[str, Linear]) -> Factors:
    """LoKr, LoHa or OFT as its own factors, of whatever rank.

    Raises:
        ValueError: it is LoRA, cannot be read, or does not fit.
    """
    file, lora = find_adapter(path), f"{path} is LoRA; set adapter=lora to go on from it"
    if is_checkpoint(file):
        kind, state, strength = read_checkpoint(file)
        if kind == "lora":
            raise ValueError(lora)
        factors = factors_of_state(kind, state, strength)
    else:
        contents = read_contents(file)
        if not all(map(kind_of_parts, contents.found.values())):
            raise ValueError(lora)
        factors = factors_in(contents, layers)
    _check_factors(path, factors, layers)
    return factors


Sizes = dict[str, tuple[int, ...]]


def sizes_of(parts: Parts) -> Sizes:
    return {part: tuple(value.shape) for part, value in parts.items()}


def check_same_factors(begun: Factors, sizes: Mapping[str, Sizes | None], adapter: Adapter) -> None:
    """See that what is gone on from has the kind, the layers and the sizes of what goes on; sizes: by layer, None where
    they are not known yet.

    Raises:
        ValueError: it has not.
    """
    said = f"adapter.start {adapter.start}"
    if begun.kind != adapter.kind:
        raise ValueError(f"{said} is {NAMES[begun.kind]}; set adapter={begun.kind}")
    lost = sorted(layer for layer in begun.layers if layer not in sizes)
    if lost:
        raise ValueError(
            f"{said} adapts {len(lost)} layers that adapter.targets={adapter.targets} does not ({lost[0]}, ...); "
            "choose targets that hold them all"
        )
    for layer, parts in begun.layers.items():
        own, wanted = sizes_of(parts), sizes[layer]
        if wanted is not None and own != wanted:
            raise ValueError(
                f"{said} has other sizes at {layer} ({_words(own)}) than are asked for ({_words(wanted)}); set "
                "adapter.rank, adapter.factor or adapter.block as it was trained with"
            )


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{part} {' x '.join(map(str, shape))}" for part, shape in sizes.items())


def check_alone(path: str, factors: Factors, count: int, weight: float) -> None:
    """See that an adapter that cannot be written as LoRA is on alone; count: of all that are on.

    Raises:
        ValueError: others are on too, or it is OFT at another weight than 1.
    """
    if count > 1:
        raise ValueError(f"{path} is {no_lora(factors)}, so that no other adapter can be beside it; run it alone")
    if factors.kind == "oft" and weight != 1.0:
        raise ValueError(f"{path} is OFT, whose turn has no strength: it is on with weight 1 alone, not {weight:g}")


def _check_factors(path: str, factors: Factors, layers: Mapping[str, Linear]) -> None:
    name = NAMES[factors.kind]
    for layer, parts in factors.layers.items():
        there, own = layers.get(layer), shape_of(parts)
        if there is None:
            raise ValueError(
                f"{path} does not fit this model: {layer} is unknown to it; choose the adapter's own base model"
            )
        if own.columns != there.columns or own.rows not in (0, there.rows):
            raise ValueError(
                f"{path} does not fit this model at {layer}: its {name} is for {own.columns} features"
                f"{f' and {own.rows} rows' if own.rows else ''} where the layer maps {there.columns} to {there.rows}; "
                "choose the adapter's own base model"
            )


def _shape(pairs: Pairs, name: str) -> Linear:
    return Linear(pairs[name].up.shape[0], pairs[name].down.shape[1])


def _mend(pairs: Pairs) -> str:
    """What an adapter is for, as far as its layers tell."""
    said = "choose the adapter's own base model"
    fit = []
    for path, sizes in SIZES.items():
        layers = linear_shapes(sizes["transformer"])
        if all(layers.get(name) == _shape(pairs, name) for name in pairs):
            fit.append(path)
    families = families_with(pairs)
    if fit:
        return f"{said}: it fits {', '.join(fit)}"
    return f"it is for {families[0].NAME}; {said}" if len(families) == 1 else said
