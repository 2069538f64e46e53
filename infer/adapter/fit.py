"""An adapter's file for a model: its pairs, which have to fit the model's layers."""

from collections.abc import Mapping

from infer.adapter.layer_names import families_with
from infer.adapter.read import Pairs, read_pairs
from infer.checkpoint.layers import linear_shapes
from infer.family.family import Linear
from infer.family.find import SIZES


def fitting_pairs(path: str, layers: Mapping[str, Linear]) -> Pairs:
    """Read an adapter file of any format for a model with these linear layers, by diffusers' names.

    Raises:
        ValueError: it cannot be read, a layer is unknown to the model, or has other features.
    """
    pairs = read_pairs(path, model=layers)
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
