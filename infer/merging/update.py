"""A weight with adapters' updates in it."""

from torch import Tensor

from infer.adapter.read import Pair

Part = tuple[Pair, float]  # an adapter's pair and the weight it is on with


def merged(weight: Tensor, parts: list[Part]) -> Tensor:
    """W [out, in] in fp32 with the updates in it."""
    for pair, amount in parts:
        update = pair.strength * (pair.up.float() @ pair.down.float())
        if pair.magnitude is not None:
            whole = weight + update
            update = whole * (pair.magnitude.float() / whole.norm(dim=1))[:, None] - weight
        weight = weight + amount * update
    return weight
