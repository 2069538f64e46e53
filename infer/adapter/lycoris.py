"""LoHa and LoKr of LyCORIS as A and B: what they add to a weight is exactly a LoRA of a higher rank.

LoHa (Hyeon-Woo et al. 2022) adds the elementwise product of two pairs of rank r, which is a pair of rank r^2: its
columns and rows are the products of each column and row of the one with each of the other. LoKr (Yeh et al. 2024) adds
the Kronecker product of w1 [a, b] and w2 = C D of rank r, which is (1_a x C)(w1 x D), a pair of rank a r, or
(w1 x C)(1_b x D), one of rank b r, x being the Kronecker product. So all that can be done with LoRA can be done with
them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from infer.adapter.factors import product

if TYPE_CHECKING:
    from torch import Tensor

PARTS = r"hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_R\.weight"
MOST = 1024  # rank of a pair beyond which it is slower than the weight itself


def rank_as_lora(parts: dict[str, Tensor]) -> int:
    """The rank of the LoRA that adds what a layer's LoHa or LoKr adds, by shapes alone; 0 where a part is absent."""
    shapes = {part: tuple(value.shape) for part, value in parts.items()}
    if "hada_w1_b" in shapes:
        return shapes["hada_w1_b"][0] * shapes.get("hada_w2_b", (0,))[0]
    sides = [_sides(shapes, "lokr_w1"), _sides(shapes, "lokr_w2")]
    return 0 if None in sides else min(sides[0][:2]) * sides[1][2]  # type: ignore[index]


def _sides(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, int, int] | None:
    """Rows, columns and rank of one of LoKr's factors."""
    ends = [shapes.get(name), shapes.get(name)] if name in shapes else [shapes.get(f"{name}_{end}") for end in "ab"]
    if any(each is None or len(each) != 2 for each in ends):
        return None
    up, down = ends[0] or (0, 0), ends[1] or (0, 0)
    return up[0], down[1], min(up[0], down[1]) if name in shapes else down[0]


def dim_of(parts: dict[str, Tensor]) -> int | None:
    """The rank that an alpha is divided by, of w2 where it has factors, else of w1; None where neither has: the
    strength is 1 then, whatever alpha says."""
    ends = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((parts[end].shape[0] for end in ends if end in parts), None)


def matrices(file: Path, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a layer in fp32.

    Raises:
        ValueError: one is no matrix.
    """
    found = {part: value.float() for part, value in parts.items() if re.fullmatch(PARTS, part)}
    bad = next((part for part, value in found.items() if value.ndim != 2 or not value.numel()), None)
    if bad is not None:
        raise ValueError(f"{file}: {bad} of {name} has the shape {list(found[bad].shape)} and is no matrix")
    return found


def as_lora(file: Path, name: str, parts: dict[str, Tensor], strength: float | None = None) -> dict[str, Tensor]:
    """One layer's tensors of LoHa or LoKr -> `down`, `up` and `alpha` of the LoRA that adds the same; DoRA's magnitude
    stays.

    strength: where a configuration says it; None: alpha does.

    Raises:
        ValueError: a tensor is absent or of another shape, or the update is of too high a rank.
    """
    import torch

    found, dim = matrices(file, name, parts), dim_of(parts)
    try:
        down, up = _loha(found) if any(part.startswith("hada_") for part in found) else _lokr(found)
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]} for {name}: copy or train it again") from error
    except RuntimeError as error:
        raise ValueError(f"{file}: the parts of {name} do not fit each other; copy or train it again") from error
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise ValueError(f"{file}: the parts of {name} do not fit each other; copy or train it again")
    if rank > MOST:
        raise ValueError(
            f"{file} adds an update of rank {rank} to {name}, and {MOST} is the most that is read; merge it into the "
            "weights with the program that made it, and give those as model.path"
        )
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{file} does not say how strong {name} is (alpha has {alpha.numel()} values); train it again")
    if strength is None:
        strength = 1.0 if dim is None or alpha is None else float(alpha) / dim
    rest = {part: value for part, value in parts.items() if part == "magnitude"}
    return rest | {"down": down.contiguous(), "up": up.contiguous(), "alpha": torch.tensor(strength * rank)}


def _loha(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B."""
    a, b, c, d = (parts[part] for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    up = (a[:, :, None] * c[:, None, :]).flatten(1)  # [out, r * r]
    down = (b[:, None, :] * d[None, :, :]).flatten(0, 1)  # [r * r, in]
    return down, up


def _lokr(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B."""
    import torch

    whole1, w2 = product(parts, "lokr_w1"), _factor(parts, "lokr_w2")
    if len(w2) == 1:
        w2 = w2[0], torch.eye(w2[0].shape[1])
        if w2[0].shape[0] < w2[0].shape[1]:
            w2 = torch.eye(w2[0].shape[0]), w2[0]
    c, d = w2
    rows, columns = whole1.shape
    if rows <= columns:
        up, down = torch.kron(torch.eye(rows), c), torch.kron(whole1, d)
    else:
        up, down = torch.kron(whole1, c), torch.kron(torch.eye(columns), d)
    return down, up


def _factor(parts: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """A matrix, or its two factors."""
    return (parts[name],) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])
