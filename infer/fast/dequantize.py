"""Stored weights -> the values that take part in products: one operator, on CUDA one pass over the weights.

Formats are bitsandbytes' own: two codes a byte, blocks of 64 codes with one absmax (QLoRA, Dettmers 2023); where those
are quantized too, absmax = code[absmax_8bit] * outer + offset, 256 of them to an outer value. On CUDA one Triton kernel
does it for several layers at once: 0.08 ms for a block's q, k, v and MLP (66 M weights, H200), 0.07 to 0.10 ms with
double quantization, where bitsandbytes' own kernels, layer by layer, take 0.09 to 0.13 and 0.22 ms.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.quantize.storage import int8_values

BLOCK = 64  # codes an absmax
OUTER = 256  # absmax an outer absmax


@torch.library.custom_op("flux_lora::dequantize_4bit", mutates_args=())
def dequantize_4bit(
    stored: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    code: Tensor | None,
    offsets: Tensor | None,
    ends: list[int],
    kind: str,
    shape: list[int],
    dtype: torch.dtype,
    turn: int,
    spare: int = 0,
) -> Tensor:
    """stored [out * in / 2] bytes -> weights [out, in] in `dtype`, with `spare` columns behind them that hold nothing
    yet.

    scale: absmax of each block in fp32, or its 8-bit code with `outer`, `code` and `offsets` (one for each of the
    layers, four at most, that are stored behind each other and end at the blocks `ends`). turn: the compiler never
    merges calls with different turns, so that the result need not be kept from one use to the next.
    """
    if stored.is_cuda:
        return _on_cuda(stored, scale, outer, code, offsets, ends, kind, shape, dtype, spare)
    if outer is not None:
        assert code is not None and offsets is not None
        scale = torch.ops.bitsandbytes.dequantize_blockwise(scale, outer, code, OUTER, torch.float32)
        counts = torch.tensor(ends).diff(prepend=torch.tensor([0]))
        scale = scale + offsets.repeat_interleave(counts)
    weights: Tensor = torch.ops.bitsandbytes.dequantize_4bit(stored, scale, BLOCK, kind, shape, dtype)
    return functional.pad(weights, (0, spare)) if spare else weights


@dequantize_4bit.register_fake
def _(
    stored: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    code: Tensor | None,
    offsets: Tensor | None,
    ends: list[int],
    kind: str,
    shape: list[int],
    dtype: torch.dtype,
    turn: int,
    spare: int = 0,
) -> Tensor:
    return stored.new_empty(shape[0], shape[1] + spare, dtype=dtype)


@lru_cache
def four_bit_values(kind: str, device: torch.device) -> Tensor:
    """The 16 values of a format."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type(kind, device=device, blocksize=BLOCK).float().contiguous()
    return values


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def unpack(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        stored, scale, outer, code, offsets, values, out, count,
        end0, end1, end2,
        columns: tl.constexpr, spare: tl.constexpr, nested: tl.constexpr, size: tl.constexpr, per: tl.constexpr,
    ) -> None:  # fmt: skip
        start = tl.program_id(0).to(tl.int64) * size
        place = start + tl.arange(0, size)
        within = place < count
        pairs = tl.load(stored + place, mask=within, other=0).to(tl.int32)
        # one absmax for every 32 bytes: loaded once and spread
        first = tl.program_id(0).to(tl.int64) * (size // per)
        blocks = first + tl.arange(0, size // per)
        inside = blocks * per < count
        if nested:
            coded = tl.load(scale + blocks, mask=inside, other=0).to(tl.int32)
            layer = (blocks >= end0).to(tl.int32) + (blocks >= end1).to(tl.int32) + (blocks >= end2).to(tl.int32)
            absmax = tl.load(code + coded) * tl.load(outer + blocks // 256, mask=inside, other=0.0)
            absmax += tl.load(offsets + layer)
        else:
            absmax = tl.load(scale + blocks, mask=inside, other=0.0)
        spread = tl.reshape(tl.broadcast_to(absmax[:, None], (size // per, per)), (size,))
        high = tl.load(values + (pairs >> 4)) * spread
        low = tl.load(values + (pairs & 15)) * spread
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        twice = 2 * start + tl.arange(0, 2 * size)
        within = twice < 2 * count
        if spare:
            twice += twice.to(tl.int32) // columns * spare
        tl.store(out + twice, both, mask=within)

    return unpack


def _on_cuda(
    stored: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    code: Tensor | None,
    offsets: Tensor | None,
    ends: list[int],
    kind: str,
    shape: list[int],
    dtype: torch.dtype,
    spare: int,
) -> Tensor:
    rows, columns = shape
    out = torch.empty(rows, columns + spare, dtype=dtype, device=stored.device)
    count, size = stored.numel(), 2048
    assert 2 * count == rows * columns < 2**31 and len(ends) <= 4, "the weights are not as their layers say"
    far = [*ends[:-1], *[count] * 4][:3]  # the last end bounds nothing
    values = four_bit_values(kind, stored.device)
    nested = outer is not None
    with torch.cuda.device(stored.device):
        _kernel()[(-(-count // size),)](
            stored, scale, outer if nested else values, code if nested else values, offsets if nested else values,
            values, out, count, *far, columns=columns if spare else 0, spare=spare, nested=nested, size=size,
            per=BLOCK // 2, num_warps=8,
            enable_fp_fusion=False,  # a product, then a sum, as bitsandbytes rounds them
        )  # fmt: skip
    return out


def dequantize_int8(stored: Tensor, scale: Tensor, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """int8 codes [out, in], whose rows have the absmax `scale` [out] -> weights [out, in] in `dtype`, with `spare`
    columns behind them that hold nothing yet. torch.compile makes one pass of plain operators; this is for where it is
    not used."""
    if not stored.is_cuda:
        return functional.pad(int8_values(stored, scale, dtype), (0, spare))
    rows, columns = stored.shape
    out = torch.empty(rows, columns + spare, dtype=dtype, device=stored.device)
    with torch.cuda.device(stored.device):
        _int8_kernel()[(rows, -(-columns // 1024))](
            stored, scale, out, columns, columns + spare, size=1024, num_warps=4
        )
    return out


@lru_cache
def _int8_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def dequantize_row(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        stored, scale, out, columns, stride, size: tl.constexpr
    ) -> None:
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * size + tl.arange(0, size)
        within = column < columns
        value = tl.load(stored + row * columns + column, mask=within, other=0).to(tl.float32)
        value *= tl.load(scale + row) / 127.0
        tl.store(out + row * stride + column, value.to(out.dtype.element_ty), mask=within)

    return dequantize_row
