"""A product that is added to what is there: one operator, one pass over the sum.

`y + x @ w.T` writes the product and reads it again with y. torch.compile keeps this one in place, on a part of a larger
tensor too; `torch.addmm` would copy y first.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

THIN = 256  # up to so many columns of x, the pass over y takes longer than the product


@torch.library.custom_op("flux_lora::add_product", mutates_args=("y",))
def add_product(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    starts: list[int] | None = None,
) -> None:
    """y [..., out] += x [..., in] weight^T, weight [out, in]; has no gradient. The rows of y are equally far apart.

    gain [out], in fp32: what all but the bias [out], which y has already, is multiplied by (DoRA). starts: the rows at
    which the second and further blocks of a weight begin that is 0 but for blocks of equal width along its diagonal.
    """
    rows, thin = y.view(-1, y.shape[-1]), x.flatten(0, -2)
    if y.is_cuda and y.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= THIN:
        _on_cuda(rows, thin, weight, gain, bias, starts or [])
        return
    if gain is None:
        rows.addmm_(thin, weight.T)
        return
    whole, least = torch.addmm(rows.float(), thin.float(), weight.float().T), 0.0 if bias is None else bias.float()
    rows.copy_((whole - least) * gain + least)


@add_product.register_fake
def _(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    starts: list[int] | None = None,
) -> None:
    return None


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def add(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        y, x, weight, gain, bias, rows, columns, stride, start1, start2, start3,
        gained: tl.constexpr, biased: tl.constexpr, inner: tl.constexpr, own: tl.constexpr,
        tall: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(1) * tall + tl.arange(0, tall)
        first = tl.program_id(0) * wide
        column = first + tl.arange(0, wide)
        # of all `inner`, the `own` columns of x that the block has which these outputs lie in
        block = (first >= start1).to(tl.int32) + (first >= start2).to(tl.int32) + (first >= start3).to(tl.int32)
        place = y + row.to(tl.int64)[:, None] * stride + column[None, :]
        within = (row < rows)[:, None] & (column < columns)[None, :]
        old = tl.load(place, mask=within, other=0.0)
        total = old.to(tl.float32)
        for start in range(0, own, deep):
            inside = start + tl.arange(0, deep)
            k = block * own + inside
            a = tl.load(
                x + row[:, None] * inner + k[None, :], mask=(row < rows)[:, None] & (inside < own)[None, :], other=0.0
            )
            b = tl.load(
                weight + column[None, :] * inner + k[:, None],
                mask=(column < columns)[None, :] & (inside < own)[:, None],
                other=0.0,
            )
            total = tl.dot(a, b, total)
        if gained:
            by = tl.load(gain + column, mask=column < columns, other=1.0)[None, :]
            if biased:
                least = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
                total = (total - least) * by + least
            else:
                total *= by
        tl.store(place, total.to(old.dtype), mask=within)

    return add


def _on_cuda(y: Tensor, x: Tensor, weight: Tensor, gain: Tensor | None, bias: Tensor | None, starts: list[int]) -> None:
    """In one kernel: cuBLAS reads and writes y by tiles made for long products."""
    rows, columns, inner = *y.shape, x.shape[1]
    assert y.stride(1) == 1 and rows * inner < 2**31, "rows that lie in one piece, and 32-bit places in x"
    x, weight = x.contiguous(), weight.contiguous()
    # measured at 4,608 rows: 48 us for 9,216 columns of three blocks of 16 (H200), 71 us for as many of 48 that are no
    # blocks, 19 us for 3,072 of 16 (H100)
    if 1 <= len(starts) <= 3 and all(start % 128 == 0 for start in starts):
        tall, wide, warps = 64, 128, 4
    else:
        starts = []  # a tile may lie in two blocks
        tall, wide, warps = (64, 64, 4) if inner > 32 else (128, 128, 8)
    own = inner // (1 + len(starts))
    with torch.cuda.device(y.device):
        _kernel()[(-(-columns // wide), -(-rows // tall))](
            y, x, weight, y if gain is None else gain, y if bias is None else bias, rows, columns, y.stride(0),
            *[*starts, *[columns] * 3][:3],
            gained=gain is not None, biased=gain is not None and bias is not None, inner=inner, own=own,
            tall=tall, wide=wide, deep=min(64, max(16, 1 << (own - 1).bit_length())), num_warps=warps,
        )  # fmt: skip
