"""Stored weights -> the values that take part in products, with the adapters' update added before they are rounded.

A product with them has the update in it, and so has the gradient of its input. It costs next to nothing, and a small
update survives: added to a bf16 product, an update of a thousandth of it keeps 53 % of its effect, added to the
quantized weight in fp32, whose roundings lie anywhere, 99.97 %. Weights that are bf16 themselves would lose it: theirs
are added to the product.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infer.fast.dequantize import BLOCK, four_bit_values
from infer.fast.thin import Thin
from infer.fast.weights import Stack, dequantize, four_bit_ends

TALL, WIDE = 64, 256  # of a program's tile
MOST = 0  # rank of a layer up to which its adapter is added to the weights; 0: to products alone, as was timed.
# By tensor cores folding took 7 ms of a step more than it saved; the plain sums below were not timed (docs/speed.md)


def folds(frozen: Stack, thin: Thin | None) -> bool:
    """Whether adapters are added to these weights, and not to their products."""
    if frozen.kind == "plain" or frozen.eight is not None:
        return False
    return thin is None or thin.down.shape[0] <= MOST * (1 + len(thin.starts or ()))


def folded(frozen: Stack, thin: Thin | None, dtype: torch.dtype, turn: int = 0) -> Tensor:
    """The weights [out, in] with the adapters' update; for `turn` see dequantize_4bit."""
    if frozen.stored.is_cuda and (thin is not None or frozen.kind == "int8"):
        return _on_cuda(frozen, thin, dtype)
    if thin is None:
        return dequantize(frozen, dtype, turn)
    weights = dequantize(frozen, torch.float32)
    weights[thin.first : thin.first + thin.up.shape[0]] += thin.up.float() @ thin.down.float()
    return weights.to(dtype)


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def fold(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        stored, scale, outer, code, offsets, values, down, up, out, rows, columns, end0, end1, end2,
        first, last, rank, shift, row0, row1, row2,
        int8: tl.constexpr, nested: tl.constexpr, part: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
        per: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0) * tall + tl.arange(0, tall)
        start = tl.program_id(1) * wide
        column = start + tl.arange(0, wide)
        inside, across = row < rows, column < columns
        line = row.to(tl.int64)
        if int8:
            place = line[:, None] * columns + column[None, :]
            whole = tl.load(stored + place, mask=inside[:, None] & across[None, :], other=0).to(tl.float32)
            whole *= (tl.load(scale + row, mask=inside, other=0.0) / 127.0)[:, None]
        else:
            half = start // 2 + tl.arange(0, wide // 2)
            within = inside[:, None] & (half < columns // 2)[None, :]
            pairs = tl.load(stored + line[:, None] * (columns // 2) + half[None, :], mask=within, other=0).to(tl.int32)
            block = start // 64 + tl.arange(0, wide // 64)
            blocks = line[:, None] * (columns // 64) + block[None, :]
            there = inside[:, None] & (block < columns // 64)[None, :]
            if nested:
                coded = tl.load(scale + blocks, mask=there, other=0).to(tl.int32)
                layer = (blocks >= end0).to(tl.int32) + (blocks >= end1).to(tl.int32) + (blocks >= end2).to(tl.int32)
                absmax = tl.load(code + coded) * tl.load(outer + blocks // 256, mask=there, other=0.0)
                absmax += tl.load(offsets + layer)
            else:
                absmax = tl.load(scale + blocks, mask=there, other=0.0)
            spread = tl.broadcast_to(absmax[:, :, None], (tall, wide // 64, per))
            spread = tl.reshape(spread, (tall, wide // 2))
            high = tl.load(values + (pairs >> 4)) * spread
            low = tl.load(values + (pairs & 15)) * spread
            whole = tl.interleave(high, low)
        # the columns of up that this tile's layer has: `part` of them, or all where a tile may have two layers
        head = tl.program_id(0) * tall
        own = (head >= row0).to(tl.int32) + (head >= row1).to(tl.int32) + (head >= row2).to(tl.int32)
        for i in tl.static_range(part):
            inner = own * shift + i
            b = tl.load(up + (row - first) * rank + inner, mask=(row >= first) & (row < last), other=0.0)
            a = tl.load(down + inner * columns + column, mask=across, other=0.0)
            by = tl.broadcast_to(b.to(tl.float32)[:, None], (tall, wide))
            whole = tl.fma(by, tl.broadcast_to(a.to(tl.float32)[None, :], (tall, wide)), whole)
        place = line[:, None] * columns + column[None, :]
        tl.store(out + place, whole.to(out.dtype.element_ty), mask=inside[:, None] & across[None, :])

    return fold


def _on_cuda(frozen: Stack, thin: Thin | None, dtype: torch.dtype) -> Tensor:
    rows, columns = frozen.shape
    out = torch.empty(rows, columns, dtype=dtype, device=frozen.stored.device)
    scale = frozen.scale
    assert scale is not None
    outer, code, offsets = frozen.nested or (scale, scale, scale)
    int8 = frozen.kind == "int8"
    values = scale if int8 else four_bit_values(frozen.kind, out.device)
    ends = [] if int8 else four_bit_ends(frozen)[:-1]
    far = [*ends, *[2**31 - 1] * 4][:3]
    first, last, rank, part, shift, layers = 0, 0, 0, 0, 0, [2**31 - 1] * 3
    down, up = out, out
    if thin is not None:
        down, up, first, last = thin.down, thin.up, thin.first, thin.first + thin.up.shape[0]
        rank = part = down.shape[0]
        if thin.starts is not None and all(start % TALL == 0 for start in (first, *thin.starts)):
            part = shift = rank // (1 + len(thin.starts))
            layers = [*[first + start for start in thin.starts], *layers][:3]
    with torch.cuda.device(out.device):
        _kernel()[(-(-rows // TALL), -(-columns // WIDE))](
            frozen.stored, scale, outer, code, offsets, values, down, up, out, rows, columns, *far,
            first, last, rank, shift, *layers, int8=int8, nested=frozen.nested is not None, part=part,
            tall=TALL, wide=WIDE, per=BLOCK // 2, num_warps=8,
            enable_fp_fusion=False,  # a product, then a sum, as bitsandbytes rounds them
        )  # fmt: skip
    return out
