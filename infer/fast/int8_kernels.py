"""int8 operands and products on CUDA: rows that are rotated and rounded, and their product, which is scaled as it is
written. One operator each.

The product has two kernels: one that Hopper's copy engine feeds, and one with ordinary loads for cards from Ampere on.
cuBLAS' own int8 product writes 32-bit sums, which have to be read again: on an H100 it takes bf16's time.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infer.fast.unpack_8bit import LEAST, LIMITS, hadamard


@torch.library.custom_op("flux_lora::rotate_round", mutates_args=())
def rotate_round(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, n] -> int8 [rows, n] of its rotated rows, and what each is multiplied by, fp32 [rows, 1]."""
    assert x.is_cuda and x.dtype == torch.bfloat16, "a CPU does without, and products are in bf16's place"
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    blocks = max(16, 1 << (width // 128 - 1).bit_length())  # a product has 16 rows at least
    with torch.cuda.device(x.device):
        _round()[(rows,)](
            x, hadamard(x.device, torch.bfloat16), out, scales, width, least=LEAST, limit=LIMITS["int8"], blocks=blocks,
            num_warps=4 if blocks <= 32 else 16,
        )  # fmt: skip
    return out, scales


@rotate_round.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("flux_lora::multiply_int8", mutates_args=())
def multiply_int8(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """int8 a [m, k] times b [n, k] transposed, over scales rows [m, 1] and columns [n], in bf16 [m, n].

    k and n are multiples of 128.
    """
    copies = torch.cuda.get_device_capability(a.device)[0] >= 9
    return by_copies(a, b, rows, columns) if copies else by_loads(a, b, rows, columns)


@multiply_int8.register_fake
def _(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16)


def by_copies(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The product by Hopper's copy engine: 1,262 T operations a second of 8,192 x 8,192 x 8,192 on an H100."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    (m, k), n, tall, deep = a.shape, b.shape[0], 128, 128
    # long sums of few columns: smaller tiles fill the card
    wide = 256 if n % 256 == 0 and -(-m // tall) * (n // 256) >= 2 * 132 else 128
    tiles = [TensorDescriptor.from_tensor(x, [size, deep]) for x, size in ((a, tall), (b, wide))]
    target = TensorDescriptor.from_tensor(out, [tall, wide])
    with torch.cuda.device(a.device):
        _products()[0][(-(-m // tall) * (n // wide),)](
            *tiles, target, rows, columns, m, n, k, tall=tall, wide=wide, deep=deep,
            num_stages=3 if wide == 256 else 4, num_warps=8,
        )  # fmt: skip
    return out


def by_loads(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The product by ordinary loads, in tiles that fit the shared memory of consumers' cards."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    (m, k), n, tall, wide, deep = a.shape, b.shape[0], 128, 128, 64
    with torch.cuda.device(a.device):
        _products()[1][(-(-m // tall) * (n // wide),)](
            a, b, out, rows, columns, m, n, k, tall=tall, wide=wide, deep=deep, num_stages=4, num_warps=8
        )
    return out


@lru_cache
def _round() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def round_row(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        x, matrix, out, scales, width, least: tl.constexpr, limit: tl.constexpr, blocks: tl.constexpr,
    ) -> None:  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, 128)
        place = tl.arange(0, blocks)[:, None] * 128 + column[None, :]
        v = tl.load(x + row * width + place, mask=place < width, other=0.0)
        turned = tl.dot(v, tl.load(matrix + column[:, None] * 128 + column[None, :])) * 0.08838834764831845
        top = tl.maximum(tl.max(tl.max(tl.abs(turned), 1), 0), least)
        tl.store(scales + row, top / limit)
        whole = (turned * (limit / top) + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number
        tl.store(out + row * width + place, whole.to(tl.int8), mask=place < width)

    return round_row


@lru_cache
def _products() -> tuple[Any, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def place_of(m, n, tall: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
        # eight rows of tiles together: what they read stays in the cache
        high, across = tl.cdiv(m, tall), tl.cdiv(n, wide)
        group = tl.program_id(0) // (8 * across)
        size = min(high - group * 8, 8)
        own = tl.program_id(0) % (8 * across)
        return (group * 8 + own % size) * tall, (own // size) * wide

    @triton.jit
    def with_copies(  # type: ignore[no-untyped-def]
        a, b, out, rows, columns, m, n, k, tall: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
    ) -> None:  # fmt: skip
        row, column = place_of(m, n, tall, wide)
        total = tl.zeros((tall, wide), dtype=tl.int32)
        for start in range(0, k, deep):
            total = tl.dot(a.load([row, start]), b.load([column, start]).T, total, out_dtype=tl.int32)
        own = row + tl.arange(0, tall)
        left, right = tl.load(rows + own, mask=own < m, other=0.0), tl.load(columns + column + tl.arange(0, wide))
        out.store([row, column], (total.to(tl.float32) * left[:, None] * right[None, :]).to(tl.bfloat16))

    @triton.jit
    def with_loads(  # type: ignore[no-untyped-def]
        a, b, out, rows, columns, m, n, k, tall: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
    ) -> None:  # fmt: skip
        row, column = place_of(m, n, tall, wide)
        own, other, inner = row + tl.arange(0, tall), column + tl.arange(0, wide), tl.arange(0, deep)
        a += (own % m).to(tl.int64)[:, None] * k + inner[None, :]
        b += other.to(tl.int64)[None, :] * k + inner[:, None]
        total = tl.zeros((tall, wide), dtype=tl.int32)
        for _ in range(0, k, deep):
            total = tl.dot(tl.load(a), tl.load(b), total, out_dtype=tl.int32)
            a += deep
            b += deep
        left, right = tl.load(rows + own, mask=own < m, other=0.0), tl.load(columns + other)
        y = (total.to(tl.float32) * left[:, None] * right[None, :]).to(tl.bfloat16)
        tl.store(out + own.to(tl.int64)[:, None] * n + other[None, :], y, mask=(own < m)[:, None])

    return with_copies, with_loads
