"""DoRA's gains: what each output of an adapted layer is multiplied by, its magnitude over the norm of its weights' row
(Liu et al. 2024, equation 5). Norms are constants to the gradient, as in their section 4.3."""

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.kept_attention import noted
from infer.fast.thin import Thin
from infer.fast.weights import Linear, dequantize_at_once

DEEP, TALL, WIDE = 512, 16, 256  # rows of a program; rows and columns of its tile


def has_gain(layers: Linear) -> bool:
    """Whether an adapter of theirs is DoRA's."""
    return any(lora.magnitude is not None for adapters in layers.adapters for lora in adapters)


def gain_of(layers: Linear, thin: Thin, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gains [rows of thin.up] in fp32, with the magnitudes' gradient; 1 where a layer has no DoRA.

    weights: those of all layers, in the products' dtype; None: they are dequantized here, unless norms are noted.
    """
    norms = noted(lambda: _norms(layers, thin, weights, dtype))
    gains, end = [], thin.first + thin.up.shape[0]
    for last, width, adapters in zip(
        accumulate(layers.frozen.widths), layers.frozen.widths, layers.adapters, strict=True
    ):
        if not thin.first < last <= end:
            continue
        own = norms[last - width - thin.first : last - thin.first]
        magnitude = adapters[0].magnitude if adapters else None
        gains.append(torch.ones_like(own) if magnitude is None else magnitude.float() / own)
    return torch.cat(gains) if len(gains) > 1 else gains[0]


@torch.no_grad()
def _norms(layers: Linear, thin: Thin, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of the rows of W + up down, without forming it, in fp32."""
    whole = dequantize_at_once(layers.frozen, dtype) if weights is None else weights
    own = whole[thin.first : thin.first + thin.up.shape[0]]
    up, down = thin.up.float(), thin.down.float()
    # rounding the second term to the products' dtype is seen little: it is a small part of the first
    cross = functional.linear(own, thin.down.to(own.dtype)).float()
    squares = torch.linalg.vector_norm(own, dim=1, dtype=torch.float32).square()
    norms: Tensor = (squares + 2 * (up * cross).sum(1) + ((up @ (down @ down.T)) * up).sum(1)).sqrt()
    return norms


def gain_backward(gradient: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """The gradient [..., out] before the gains, and that of the gains [rows]: outputs from `first` on have them.

    y: the outputs [..., out], bias included: divided by the gain, what that multiplied.
    """
    rows, values = gradient.flatten(0, -2), y.flatten(0, -2)
    if gradient.is_cuda:
        passed, sums = _on_cuda(rows, values, gain, bias, first)
    else:
        end = first + len(gain)
        part = values[:, first:end].float()
        part = part if bias is None else part - bias[first:end].float()
        passed = rows.clone()
        passed[:, first:end] = (rows[:, first:end].float() * gain).to(rows.dtype)
        sums = (rows[:, first:end].float() * part).sum(0)
    return passed.view(gradient.shape), sums / gain


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["rows"])
    def backward(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        gradient, y, gain, bias, passed, sums, rows, columns, first, end, gradient_row, y_row,
        biased: tl.constexpr, deep: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
    ) -> None:  # fmt: skip
        column = tl.program_id(0) * wide + tl.arange(0, wide)
        mine = (column >= first) & (column < end)
        by = tl.load(gain + column - first, mask=mine, other=1.0)
        least = tl.zeros([wide], tl.float32)
        if biased:
            least = tl.load(bias + column, mask=mine, other=0.0).to(tl.float32)
        total = tl.zeros([wide], tl.float32)
        for start in range(0, deep, tall):
            row = (tl.program_id(1) * deep + start + tl.arange(0, tall)).to(tl.int64)
            within = (row < rows)[:, None] & (column < columns)[None, :]
            g = tl.load(gradient + row[:, None] * gradient_row + column[None, :], mask=within, other=0.0)
            g = g.to(tl.float32)
            place = passed + row[:, None] * columns + column[None, :]
            tl.store(place, (g * by[None, :]).to(passed.dtype.element_ty), mask=within)
            value = tl.load(y + row[:, None] * y_row + column[None, :], mask=within & mine[None, :], other=0.0)
            total += tl.sum(g * (value.to(tl.float32) - least[None, :]), 0)
        tl.store(sums + tl.program_id(1) * (end - first) + column - first, total, mask=mine)

    return backward


def _on_cuda(gradient: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """gradient, y [rows, columns] -> what is passed on [rows, columns], and the sums of gradient * (y - bias)."""
    gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
    assert y.stride(1) == 1
    rows, columns = gradient.shape
    passed, parts = gradient.new_empty(rows, columns), -(-rows // DEEP)
    sums = gain.new_empty(parts, len(gain))
    with torch.cuda.device(y.device):
        _kernel()[(-(-columns // WIDE), parts)](
            gradient, y, gain, gain if bias is None else bias, passed, sums, rows, columns, first, first + len(gain),
            gradient.stride(0), y.stride(0), biased=bias is not None, deep=DEEP, tall=TALL, wide=WIDE, num_warps=4,
        )  # fmt: skip
    return passed, sums.sum(0)
