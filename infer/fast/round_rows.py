"""fp8 rows for a product, and the product's scales and bias applied to it: one pass each.

torch.compile has both a part of what makes the rows and of what reads the product; these are for where it is not used.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infer.fast.unpack_8bit import LEAST, LIMITS

WIDE = 1024


@lru_cache
def _kernels() -> tuple[Any, Any]:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def round_rows(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        x, out, scales, width, least, limit, size: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, size)
        values = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        top = tl.maximum(tl.max(tl.abs(values), 0), least)
        tl.store(out + row * width + column, (values * (limit / top)).to(out.dtype.element_ty), mask=column < width)
        tl.store(scales + row, top / limit)

    @triton.jit
    def scale_product(  # type: ignore[no-untyped-def]
        y, rows, columns, bias, width, biased: tl.constexpr, size: tl.constexpr
    ) -> None:
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * size + tl.arange(0, size)
        within = column < width
        value = tl.load(y + row * width + column, mask=within, other=0.0).to(tl.float32)
        value = value * tl.load(rows + row) * tl.load(columns + column, mask=within, other=0.0)
        if biased:
            value += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)
        tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=within)

    return round_rows, scale_product


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, n] on CUDA in fp8, and what each row is multiplied by, fp32 [rows, 1]."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    size = 1 << (x.shape[1] - 1).bit_length()
    with torch.cuda.device(x.device):
        _kernels()[0][(len(x),)](
            x, out, scales, x.shape[1], LEAST, LIMITS["fp8"], size=size, num_warps=16 if size > 4096 else 4
        )
    return out, scales


def scale_product(y: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """y [m, n] on CUDA times rows [m, 1] and columns [n], plus bias [n]; in place."""
    with torch.cuda.device(y.device):
        _kernels()[1][(len(y), -(-y.shape[1] // WIDE))](
            y, rows, columns, columns if bias is None else bias, y.shape[1], biased=bias is not None, size=WIDE,
            num_warps=4,
        )  # fmt: skip
    return y
