"""What layers are called: by diffusers, by Black Forest Labs (kohya, ComfyUI and ai-toolkit follow) and by others.

Black Forest Labs' models have one layer where diffusers has several that read the same input; their rows stand in the
order that the family's table gives. Sources: infer/family, kohya-ss/sd-scripts `networks/convert_flux_lora.py`,
kohya-ss/musubi-tuner `networks/lora_flux_2.py` and `convert_lora.py`, ostris/ai-toolkit `flux2_model.py`.
"""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from infer.family.family import Family, Names, Table
from infer.family.find import FAMILIES

_BLOCK = re.compile(
    # sformer_blocks: what is left of transformer_blocks where a program took off the prefix `tran`
    r"(single_transformer_blocks|transformer_blocks|sformer_blocks|double_blocks|single_blocks)_(\d+)_(.+)"
)
OWNERS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _flattened(*tables: Table) -> Table:
    """Names with underscores for dots, which is how kohya writes them, and each of diffusers' own names as itself."""
    found = {_flat(name): layers for table in tables for name, layers in table.items()}
    parts = {  # OneTrainer numbers the layers that are one in Black Forest Labs' model
        f"{_flat(name)}_{i}": (layer,)
        for table in tables
        for name, layers in table.items()
        for i, layer in enumerate(layers)
        if len(layers) > 1
    }
    return found | parts | {_flat(layer): (layer,) for table in tables for layers in table.values() for layer in layers}


def _tables(names: Names) -> tuple[Table, Table, Table]:
    """Within double blocks, within single blocks, and outside."""
    outside = _flattened(names.outside) | {"img_in_proj": names.outside["img_in"]}  # as OneTrainer writes it
    return _flattened(names.double, names.double_also), _flattened(names.single, names.single_also), outside


def _proportions(family: Family) -> dict[str, Fraction]:
    """Rows for each column of the layers within blocks, by their names in block 0: the same at every size."""
    config = next(iter(family.SIZES.values()))["transformer"] | {"num_layers": 1, "num_single_layers": 1}
    shapes = family.linear_shapes(config)
    return {name: Fraction(*shape) for name, shape in shapes.items() if name.partition(".")[0] in OWNERS}


TABLES = {family.NAME: _tables(family.NAMES) for family in FAMILIES}
PROPORTIONS = {family.NAME: _proportions(family) for family in FAMILIES}


def layers_of(name: str, family: Family) -> tuple[str, ...]:
    """diffusers' names of the layers that anybody's name means, with dots or underscores; () if it means none."""
    double, single, outside = TABLES[family.NAME]
    match = _BLOCK.fullmatch(_flat(name))
    if match is None:
        return outside.get(_flat(name), ())
    kind, number, rest = match.groups()
    owner, table = ("single_transformer_blocks", single) if kind[:6] == "single" else ("transformer_blocks", double)
    return tuple(f"{owner}.{number}.{layer}" for layer in table.get(rest, ()))


def families_with(names: Iterable[str]) -> list[Family]:
    """The families that have a layer for each of these names."""
    names = list(names)
    return [family for family in FAMILIES if all(layers_of(name, family) for name in names)]


def halves_swapped(name: str) -> bool:
    """Whether a layer's rows stand in two halves that diffusers has the other way round."""
    return any(_flat(name) == _flat(family.NAMES.swapped) for family in FAMILIES)


def original_name(layer: str) -> tuple[str, tuple[str, ...]]:
    """Black Forest Labs' name of the layer that holds a layer of diffusers', and all of diffusers' layers in it.

    Families that share a layer's name share what it is within.
    """
    kind, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    for family in FAMILIES:
        tables = {"transformer_blocks": family.NAMES.double, "single_transformer_blocks": family.NAMES.single}
        there = inner if kind in tables else layer
        for name, layers in tables.get(kind, family.NAMES.outside).items():
            if there in layers and kind in tables:
                return f"{OWNERS[kind]}.{number}.{name}", tuple(f"{kind}.{number}.{each}" for each in layers)
            if there in layers:
                return name, layers
    raise AssertionError(f"{layer} is of no family")


def proportion(layer: str, family: Family) -> Fraction | None:
    """Rows for each column of a layer by diffusers' name; None outside the blocks, where it depends on the model."""
    return PROPORTIONS[family.NAME].get(re.sub(r"\.\d+\.", ".0.", layer, count=1))


def rows_within(layers: Sequence[str], family: Family, columns: int) -> list[int]:
    """The rows of each of diffusers' layers that are one in Black Forest Labs' model, which reads so many features."""
    proportions = [proportion(layer, family) for layer in layers]
    return [int(columns * each) for each in proportions if each is not None]
