"""Which family an adapter's file is of: names that both have can mean different layers, whose sizes then tell.

`single_blocks.0.linear1` reads q, k, v and the MLP in every family, but the MLP's width, and so the layer's rows for
each column, are a family's own. Outside the blocks, `time_in` and `guidance_in` are alike in all families and called
otherwise by diffusers: where no other layer tells, the model that the file is for does.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from infer.adapter.layer_names import families_with, layers_of, proportion
from infer.family.family import Family, Linear
from infer.family.find import FAMILIES


def file_family(file: Path, shapes: Mapping[str, Linear], model: Container[str] | None) -> Family:
    """The family that the names in a file are of; any that fits if these mean the same in several.

    Args:
        shapes: rows of B and columns of A by the file's own names, without prefixes.
        model: diffusers' names of the layers of the model that it is for, where one is known.

    Raises:
        ValueError: no family has all of the names, or has them at such proportions; or the file does not tell.
    """
    families = families_with(shapes)
    if not families:
        own = {family.NAME: [name for name in shapes if families_with([name]) == [family]] for family in FAMILIES}
        said = " and ".join(f"{name} ({layers[0]})" for name, layers in own.items() if layers)
        raise ValueError(f"{file} has names of layers of {said}; it mixes two adapters, keep one of them")
    for name in _unlike(shapes, families):
        fitting = [family for family in families if _fits(name, shapes[name], family)]
        if not fitting:
            rows, columns = shapes[name]
            known = " and ".join(f"{_whole(name, family)} in {family.NAME}" for family in families)
            raise ValueError(
                f"{file} does not fit any model at {name}: B has {rows} rows for {columns} features, which is "
                f"{Fraction(rows, columns)} for each, and {known}; copy or train it again"
            )
        families = fitting
    unlike = _unlike(shapes, families)
    if unlike and model is None:
        raise ValueError(
            f"{file} does not tell which model it is for: {unlike[0]} is in {' and '.join(f.NAME for f in families)}, "
            "and called otherwise by diffusers; give it as it is where its model is given too (adapter.path, "
            "adapter.start)"
        )
    there = [f for f in families if all(layer in (model or ()) for name in unlike for layer in layers_of(name, f))]
    return (there or families)[0]


def _unlike(names: Iterable[str], families: Collection[Family]) -> list[str]:
    """The names that mean different layers in these families."""
    return [name for name in names if len({layers_of(name, family) for family in families}) > 1]


def _whole(name: str, family: Family) -> Fraction | None:
    """Rows for each column of all that a name means; None where the model says."""
    found = [proportion(layer, family) for layer in layers_of(name, family)]
    return sum((each for each in found if each is not None), Fraction(0)) if None not in found else None


def _fits(name: str, shape: Linear, family: Family) -> bool:
    wanted = _whole(name, family)
    return wanted is None or wanted == Fraction(shape.rows, shape.columns)
