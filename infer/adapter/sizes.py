"""On which layers an adapter to train is put, and how many numbers it has on each, by shapes alone."""

from collections.abc import Mapping

from infer.adapter.lora import Adapter
from infer.adapter.targets import match_targets
from infer.family.family import Linear


def tensor_sizes(adapter: Adapter, layer: Linear) -> list[int]:
    """Of each of its tensors on a layer."""
    rows, columns = layer
    if adapter.kind == "oft":
        return [columns * (adapter.block - 1) // 2]
    if adapter.kind == "loha":
        return [adapter.rank * side for side in (rows, columns)] * 2
    if adapter.kind == "lokr":
        (a, b), (c, d) = factors(rows, adapter.factor), factors(columns, adapter.factor)
        whole = adapter.rank >= max(b, d) / 2
        return [a * c, *([b * d] if whole else [b * adapter.rank, adapter.rank * d])]
    return [adapter.rank * columns, adapter.rank * rows, *([rows] if adapter.dora else [])]


def factors(side: int, factor: int) -> tuple[int, int]:
    """How LoKr cuts a side: by the factor where that divides it; else the two divisors whose sum is the least, the
    first of them at most the factor (-1: any); as LyCORIS and PEFT do."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = side if factor == -1 else factor
    pairs = [(m, side // m) for m in range(1, int(side**0.5) + 1) if side % m == 0 and m <= most]
    return min(pairs, key=sum)


def match_adapter(layers: Mapping[str, Linear], adapter: Adapter) -> list[str]:
    """The layers that an adapter to train is put on.

    Raises:
        ValueError: none, or one that an adapter of this kind or rank cannot be put on.
    """
    found = match_targets(layers, adapter.targets, adapter.rank if adapter.kind in ("lora", "loha") else 1)
    if adapter.kind == "oft":
        odd = [name for name in found if layers[name].columns % adapter.block]
        if odd:
            raise ValueError(
                f"adapter.block is {adapter.block}, which does not divide the {layers[odd[0]].columns} features that "
                f"{odd[0]} reads; set adapter.block to a divisor, or adapter.targets to other layers"
            )
    return found
