"""A product of few rows with int8 weights, which are read as they are stored: the modulations of a block.

Written in plain operators, it passes over the weights three times; torch.compile makes one of them, and so does this.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

TALL, DEEP = 16, 512


def few_rows_int8(x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
    """x [batch, in] times the values of int8 codes [out, in], whose rows have the absmax `scale` [out]: [batch, out] in
    fp32."""
    if x.is_cuda:
        return _on_cuda(x, stored, scale)
    rows = [(stored.float() * row.float()).sum(1) for row in x]
    return torch.stack(rows) * (scale / 127.0)


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        x, stored, scale, out, rows, columns: tl.constexpr, tall: tl.constexpr, deep: tl.constexpr
    ) -> None:
        row = tl.program_id(0) * tall + tl.arange(0, tall)
        inside = row < rows
        total = tl.zeros([tall], dtype=tl.float32)
        for start in range(0, columns, deep):
            column = start + tl.arange(0, deep)
            place = row.to(tl.int64)[:, None] * columns + column[None, :]
            codes = tl.load(stored + place, mask=inside[:, None] & (column < columns)[None, :], other=0)
            own = tl.load(x + tl.program_id(1) * columns + column, mask=column < columns, other=0.0)
            total += tl.sum(codes.to(tl.float32) * own.to(tl.float32)[None, :], 1)
        by = tl.load(scale + row, mask=inside, other=0.0) / 127.0
        tl.store(out + tl.program_id(1) * rows + row, total * by, mask=inside)

    return multiply


def _on_cuda(x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
    rows, columns = stored.shape
    out = torch.empty(len(x), rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        _kernel()[(-(-rows // TALL), len(x))](
            x.contiguous(), stored, scale, out, rows, columns=columns, tall=TALL, deep=DEEP, num_warps=4
        )
    return out
