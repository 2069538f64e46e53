"""Stored weights of any kind -> 8-bit values for one product, in the layout that it wants: one operator.

Tensor cores read 8-bit operands along the dimension that they sum over. The forward pass sums over a layer's inputs and
takes [out, in]; the gradient sums over its outputs and takes [in, out]. Neither copy is kept. On CUDA one Triton kernel
makes them from NF4, FP4, int8 or unquantized weights: 55 us for 66 M NF4 weights to fp8, 64 us transposed, 61 and 63
to int8, rotated 156 and 124 (H100; in bf16 the same takes 68).

int8 values are those of rotated weights: each 128 that are summed over are multiplied by a Hadamard matrix. A channel
of large values is spread over 128 by it, and rows times rotated rows give the same products (QuaRot, Ashkboos et al.
2024).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infer.fast.dequantize import four_bit_values

ROTATED = 128  # values that one Hadamard matrix mixes; a side of every layer is a multiple of it
LIMITS = {"fp8": 448.0, "int8": 127.0}  # largest values, to which a row's largest one is scaled
LEAST = 1e-30  # the largest value of a row of zeros
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
STORED = ("plain", "int8", "4-bit", "nested")


@lru_cache
def hadamard(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The symmetric matrix [128, 128] of ones and minus ones (Sylvester's); its square is 128 times the identity."""
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < ROTATED:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device, dtype)


def rotated(x: Tensor) -> Tensor:
    """x [..., n] in fp32, each 128 of its last dimension rotated."""
    turned: Tensor = x.unflatten(-1, (-1, ROTATED)) @ hadamard(x.device, x.dtype)
    turned = turned.flatten(-2) * float(ROTATED) ** -0.5
    return turned


def rounded(x: Tensor, products: str) -> Tensor:
    """fp32 values within the limits to the nearest that 8 bits have."""
    return x.round().to(torch.int8) if products == "int8" else x.to(DTYPES[products])


@torch.library.custom_op("flux_lora::unpack_8bit", mutates_args=())
def unpack_8bit(
    stored: Tensor,
    scale: Tensor | None,
    outer: Tensor | None,
    code: Tensor | None,
    offsets: Tensor | None,
    ends: list[int],
    kind: str,
    shape: list[int],
    scales: Tensor,
    products: str,
    across: bool,
) -> Tensor:
    """Weights [out, in] = `shape`, stored as infer/fast/weights.py has them, over their `scales`, in 8 bits.

    across: transposed, [in, out]; scales [out], or across [in]; ends: as dequantize_4bit takes them.
    """
    assert stored.is_cuda, "a CPU rounds what it has dequantized"
    rows, columns = shape
    sizes = (columns, rows) if across else (rows, columns)
    out = torch.empty(sizes, dtype=DTYPES[products], device=stored.device)
    form = "nested" if outer is not None else "4-bit" if kind in ("nf4", "fp4") else kind
    far = [*ends[:-1], *[2**31 - 1] * 4][:3]  # the last end bounds nothing
    values = four_bit_values(kind, stored.device) if kind in ("nf4", "fp4") else scales
    scale, outer, code, offsets = (values if x is None else x for x in (scale, outer, code, offsets))
    tall = 128 if across else 64
    with torch.cuda.device(stored.device):
        _kernel()[(columns // 128, rows // tall)](
            stored, scale, outer, code, offsets, values, hadamard(stored.device, torch.bfloat16), scales, out,
            rows, columns, *far, form=STORED.index(form), across=across, whole=products == "int8", tall=tall,
            num_warps=8 if across or products == "int8" else 4,
        )  # fmt: skip
    return out


@unpack_8bit.register_fake
def _(
    stored: Tensor,
    scale: Tensor | None,
    outer: Tensor | None,
    code: Tensor | None,
    offsets: Tensor | None,
    ends: list[int],
    kind: str,
    shape: list[int],
    scales: Tensor,
    products: str,
    across: bool,
) -> Tensor:
    return stored.new_empty(shape[::-1] if across else shape, dtype=DTYPES[products])


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def unpack(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        stored, scale, outer, code, offsets, values, matrix, scales, out,
        rows, columns, end0, end1, end2,
        form: tl.constexpr, across: tl.constexpr, whole: tl.constexpr, tall: tl.constexpr,
    ) -> None:  # fmt: skip
        first, start = tl.program_id(1) * tall, tl.program_id(0) * 128
        row, column = first + tl.arange(0, tall), start + tl.arange(0, 128)
        line = row.to(tl.int64)[:, None]
        if form >= 2:
            pairs = tl.load(stored + line * (columns // 2) + start // 2 + tl.arange(0, 64)[None, :]).to(tl.int32)
            w = tl.interleave(tl.load(values + (pairs >> 4)), tl.load(values + (pairs & 15)))
            blocks = row[:, None] * (columns // 64) + start // 64 + tl.arange(0, 2)[None, :]
            if form == 3:
                coded = tl.load(scale + blocks).to(tl.int32)
                layer = (blocks >= end0).to(tl.int32) + (blocks >= end1).to(tl.int32) + (blocks >= end2).to(tl.int32)
                absmax = tl.load(code + coded) * tl.load(outer + blocks // 256) + tl.load(offsets + layer)
            else:
                absmax = tl.load(scale + blocks)
            w = w * tl.reshape(tl.broadcast_to(absmax[:, :, None], (tall, 2, 64)), (tall, 128))
        else:
            w = tl.load(stored + line * columns + column[None, :]).to(tl.float32)
            if form == 1:
                w = w * (tl.load(scale + row) / 127.0)[:, None]
        if whole:  # in int8, rotated along the dimension that is summed over
            turn = tl.load(matrix + tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :])
            small = w.to(tl.bfloat16)
            w = (tl.dot(turn, small) if across else tl.dot(small, turn)) * 0.08838834764831845  # 1 / sqrt(128)
        w = w * ((1.0 / tl.load(scales + column))[None, :] if across else (1.0 / tl.load(scales + row))[:, None])
        if whole:
            w = (w + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number
        if across:
            place = out + column.to(tl.int64)[:, None] * rows + row[None, :]
            tl.store(place, tl.trans(w).to(out.dtype.element_ty))
        else:
            tl.store(out + line * columns + column[None, :], w.to(out.dtype.element_ty))

    return unpack
