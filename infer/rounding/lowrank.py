"""The best low-rank approximation of a layer's error, as the model's output feels it, and ranks by what they gain.

For an error D [out, in], inputs X [rows, in] and gradients Y [rows, out] of the model's output with respect to the
layer's, the change of that output is about Y D X^T: rank r loses least of it with
B A = (D X^T) V_r S_r^-1 U_r^T (Y D), where Y D X^T = U S V^T. It is Fisher-weighted SVD with the statistics of both
sides (as in K-FAC, Martens and Grosse 2015; with the inputs' alone it is LQER's, Zhang et al. 2024), and no inverse.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """B A for every rank up to the most, best first."""

    down: Tensor  # A [most, in]
    up: Tensor  # B [out, most]
    gains: Tensor  # what each further rank takes from the squared change of the output, [most]


def approximate(error: Tensor, inputs: Tensor, gradients: Tensor, most: int, tokens: int = 1) -> Factors:
    """error [out, in], inputs [rows, in], gradients [rows, out]; `tokens` is how many rows these stand for."""
    inputs, gradients = steadied(inputs), steadied(gradients)
    left, right = gradients @ error, error @ inputs.T  # [rows, in], [out, rows]
    core = left @ inputs.T
    if min(core.shape) > 8 * most:
        u, s, v = torch.svd_lowrank(core, q=most + 16, niter=3)
    else:
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        v = vh.T
    kept = int((s > 1e-6 * s[0]).sum()) if s[0] > 0 else 0
    kept = min(kept, most, *error.shape)
    u, s, v = u[:, :kept], s[:kept], v[:, :kept]
    root = s.sqrt()
    return Factors((u / root).T @ left, right @ (v / root), s.square() / tokens)


def steadied(rows: Tensor, damping: float = 0.03) -> Tensor:
    """Rows [n, width] with a little of every direction added (exactly up to 4,096 of them, else by random ones), and
    no more of them than the width: their Gram matrix is what counts."""
    n, width = rows.shape
    scale = (damping * rows.square().sum() / width).sqrt()
    if width <= 4096:
        extra = scale * torch.eye(width, dtype=rows.dtype, device=rows.device)
    else:
        generator = torch.Generator(rows.device).manual_seed(width)
        extra = torch.randn(n, width, generator=generator, dtype=rows.dtype, device=rows.device) * (scale / n**0.5)
    rows = torch.cat([rows, extra])
    return torch.linalg.qr(rows, mode="r").R if len(rows) > width else rows


def allot(gains: dict[str, Tensor], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Ranks by layer: the greatest gains a byte first, until the budget is spent. costs: bytes of one rank."""
    steps = sorted(
        ((float(gain) / costs[layer], layer) for layer, several in gains.items() for gain in several),
        key=lambda step: -step[0],
    )
    ranks: dict[str, int] = {}
    for gain, layer in steps:
        if gain > 0 and costs[layer] <= budget:
            budget -= costs[layer]
            ranks[layer] = ranks.get(layer, 0) + 1
    return ranks
