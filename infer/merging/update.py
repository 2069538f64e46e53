"""A weight with adapters' updates in it."""

from typing import NamedTuple

from torch import Tensor

from infer.adapter.factors import Parts, changed
from infer.adapter.read import Pair


class Factored(NamedTuple):
    """One layer of an adapter that is no LoRA."""

    parts: Parts
    strength: float


Part = tuple[Pair | Factored, float]  # an adapter's update of a layer and the weight it is on with


def merged(weight: Tensor, parts: list[Part]) -> Tensor:
    """W [out, in] in fp32 with the updates in it."""
    for pair, amount in parts:
        if isinstance(pair, Factored):
            weight = weight + amount * (changed(weight, pair.parts, pair.strength) - weight)
            continue
        update = pair.strength * (pair.up.float() @ pair.down.float())
        if pair.magnitude is not None:
            whole = weight + update
            update = whole * (pair.magnitude.float() / whole.norm(dim=1))[:, None] - weight
        weight = weight + amount * update
    return weight
