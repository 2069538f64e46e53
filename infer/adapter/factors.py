"""Adapters that are not LoRA, as PEFT's tuners hold them: LoKr, LoHa and OFT, each layer's own factors.

LoKr (Yeh et al. 2024) adds the Kronecker product of w1 [a, c] and w2 [b, d] to W [a b, c d]; w2, which is the larger
one, may be a product of rank r. LoHa (Hyeon-Woo et al. 2022) adds the elementwise product of two pairs of rank r. OFT
(Qiu et al. 2023; of inputs: Qiu et al. 2025) turns what a layer reads: x becomes x R, R being block-diagonal and
orthogonal, Cayley's (I + Q)(I - Q)^-1 of a skew-symmetric Q by the first terms of its series.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}
Parts = dict[str, "Tensor"]
"""Of one layer, by LyCORIS' names: `lokr_w1` [a, c], `lokr_w2` [b, d] or `lokr_w2_a` [b, r] and `lokr_w2_b` [r, d];
`hada_w1_a` [out, r], `hada_w1_b` [r, in], `hada_w2_a`, `hada_w2_b`; `oft_R.weight` [blocks, size (size - 1) / 2]."""


class Factors(NamedTuple):
    """An adapter that is no LoRA."""

    kind: str  # lokr, loha or oft
    layers: dict[str, Parts]  # by diffusers' names
    strengths: dict[str, float]  # of each layer; OFT's is 1


def kind_of_parts(parts: Parts) -> str | None:
    """What one layer's tensors are of; None: LoRA."""
    kinds = {"lokr_": "lokr", "hada_": "loha", "oft_": "oft"}
    return next((kind for mark, kind in kinds.items() if any(part.startswith(mark) for part in parts)), None)


def product(parts: Parts, name: str) -> Tensor:
    """A factor of LoKr as one matrix."""
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def update(parts: Parts) -> Tensor:
    """What LoKr or LoHa adds to a weight at strength 1, [out, in]."""
    import torch

    if kind_of_parts(parts) == "lokr":
        return torch.kron(product(parts, "lokr_w1"), product(parts, "lokr_w2"))
    return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])


def turn(vectors: Tensor) -> Tensor:
    """R - I of each block, [blocks, size, size], from the entries above the diagonal of Q, row by row.

    (I + Q)(I - Q)^-1 = I + 2 (Q + Q^2 + ...), of which PEFT and OneTrainer take 2 Q + 2 Q^2 + 2 Q^3 + Q^4.
    """
    import torch

    blocks, entries = vectors.shape
    size = block_size(entries)
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(blocks, size, size).index_put((torch.arange(blocks)[:, None], rows, columns), vectors)
    q = upper - upper.mT
    square = q @ q
    return 2 * (q + square + square @ q) + square @ square


def block_size(entries: int) -> int:
    """The side of the blocks of which so many entries stand above the diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., in] R, for R - I of each block of `in`."""
    import torch

    blocks, size, _ = turns.shape
    return x + torch.einsum("...bi,bij->...bj", x.unflatten(-1, (blocks, size)), turns).flatten(-2)


def changed(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    """W [out, in] in fp32 with a layer's update in it."""
    if "oft_R.weight" in parts:
        # (x R) W^T = x (W R^T)^T
        return turned(weight, turn(parts["oft_R.weight"].float()).mT)
    return weight + strength * update({part: value.float() for part, value in parts.items()})


def factors_of_state(kind: str, state: dict[str, Tensor], strength: float) -> Factors:
    """`adapter_state` of LoKr, LoHa or OFT as factors, all of one strength, which OFT has not."""
    layers: dict[str, Parts] = {}
    for key, value in state.items():
        layer, _, part = key.removesuffix(".weight").rpartition(".")
        layers.setdefault(layer, {})[f"{part}.weight" if key.endswith(".weight") else part] = value
    return Factors(kind, layers, dict.fromkeys(layers, 1.0 if kind == "oft" else strength))
