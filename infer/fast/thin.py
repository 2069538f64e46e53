"""The adapters of layers that read one input as two thin matrices, in the dtype of the products.

down [rank, in] has the layers' A below each other, each filled with zeros to a multiple of 8 rows, without which
products fall to slow kernels; up [out, rank] has their B, times their strength, in blocks along its diagonal, from the
first adapted layer's output to the last one's.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infer.fast.weights import Linear, Lora

MOST = 4  # layers that the kernels take
WIDE = 1024


class Thin(NamedTuple):
    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    first: int  # the output that `up` begins at
    starts: tuple[int, ...] | None = None  # rows of `up` at which its second and further layers begin, of equal ranks


def thin_of(layers: Linear, dtype: torch.dtype) -> Thin | None:
    """The adapters of some layers; None where there is none."""
    adapted = [i for i, adapters in enumerate(layers.adapters) if adapters]
    if not adapted:
        return None
    begin, end = adapted[0], adapted[-1] + 1
    widths, chosen = layers.frozen.widths[begin:end], layers.adapters[begin:end]
    first = sum(layers.frozen.widths[:begin])
    single = [own[0] for own in chosen if len(own) == 1]
    uniform = len(single) == len(chosen) <= MOST and len({lora.down.shape[0] for lora in single}) == 1
    if uniform:
        tensors = [tensor for lora in single for tensor in (lora.down, lora.up)]
        down, up = _Packed.apply([lora.strength for lora in single], widths, dtype, *tensors)
        starts = tuple(sum(widths[:i]) for i in range(1, len(widths)))
        return Thin(down, up, first, starts)
    return Thin(*_several(chosen, widths, dtype), first)


def _several(
    chosen: tuple[tuple[Lora, ...], ...], widths: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of adapters of several ranks, or several on one layer."""
    every = [lora for own in chosen for lora in own]
    device = every[0].down.device
    downs = [_filled(lora.down, 0) for lora in every]
    ups = [
        torch.cat([_filled(lora.up * lora.strength, 1) for lora in own], dim=1)
        if own
        else torch.zeros(width, 0, device=device)
        for own, width in zip(chosen, widths, strict=True)
    ]
    return torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)


def padded_rank(rank: int) -> int:
    """Rows of `down`, or columns of `up`, of an adapter of a rank."""
    return -(-rank // 8) * 8


def _filled(thin: Tensor, dimension: int) -> Tensor:
    missing = padded_rank(thin.shape[dimension]) - thin.shape[dimension]
    return torch.nn.functional.pad(thin, (0, missing) if dimension else (0, 0, 0, missing))


class _Packed(torch.autograd.Function):
    """(strengths, widths, dtype, A and B of each layer in turn) -> down and up."""

    @staticmethod
    def forward(
        ctx: Any, strengths: list[Tensor], widths: tuple[int, ...], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        downs, ups = tensors[::2], tensors[1::2]
        ctx.strengths, ctx.widths, ctx.rank, ctx.dtype = strengths, widths, downs[0].shape[0], downs[0].dtype
        if downs[0].is_cuda:
            return _pack_on_cuda(strengths, widths, dtype, downs, ups)
        down = torch.cat([_filled(each, 0) for each in downs])
        scaled = [_filled(each * strength, 1) for each, strength in zip(ups, strengths, strict=True)]
        return down.to(dtype), torch.block_diag(*scaled).to(dtype)

    @staticmethod
    def backward(ctx: Any, of_down: Tensor, of_up: Tensor) -> tuple[Tensor | None, ...]:
        rank, found, row = ctx.rank, list[Tensor | None](), 0
        padded = padded_rank(rank)
        of_down = of_down.to(ctx.dtype)
        for i, (width, strength) in enumerate(zip(ctx.widths, ctx.strengths, strict=True)):
            found.append(of_down[i * padded : i * padded + rank])
            own = of_up[row : row + width, i * padded : i * padded + rank]
            found.append(own.to(ctx.dtype) * strength)
            row += width
        return None, None, None, *found


@lru_cache
def _kernel() -> Any:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def pack(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        a0, a1, a2, a3, b0, b1, b2, b3, s0, s1, s2, s3, down, up, rank, padded, every, inputs, outputs,
        end0, end1, end2, columns: tl.constexpr, size: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0)
        if row < every:
            layer, own = row // padded, row % padded
            place = tl.program_id(1) * size + tl.arange(0, size)
            within = (place < inputs) & (own < rank)
            x = tl.load(a0 + own * inputs + place, mask=within & (layer == 0), other=0.0).to(tl.float32)
            x += tl.load(a1 + own * inputs + place, mask=within & (layer == 1), other=0.0).to(tl.float32)
            x += tl.load(a2 + own * inputs + place, mask=within & (layer == 2), other=0.0).to(tl.float32)
            x += tl.load(a3 + own * inputs + place, mask=within & (layer == 3), other=0.0).to(tl.float32)
            tl.store(down + row * inputs + place, x.to(down.dtype.element_ty), mask=place < inputs)
        elif tl.program_id(1) == 0:
            tall: tl.constexpr = 64
            out = (row - every) * tall + tl.arange(0, tall)
            at = (out >= end0).to(tl.int32) + (out >= end1).to(tl.int32) + (out >= end2).to(tl.int32)
            begin = tl.where(at == 0, 0, tl.where(at == 1, end0, tl.where(at == 2, end1, end2)))
            column = tl.arange(0, columns)
            mine = (column[None, :] // padded == at[:, None]) & (column[None, :] % padded < rank)
            mine = mine & (out < outputs)[:, None]
            source = (out - begin)[:, None] * rank + column[None, :] % padded
            y = tl.load(b0 + source, mask=mine & (at == 0)[:, None], other=0.0).to(tl.float32) * tl.load(s0)
            y += tl.load(b1 + source, mask=mine & (at == 1)[:, None], other=0.0).to(tl.float32) * tl.load(s1)
            y += tl.load(b2 + source, mask=mine & (at == 2)[:, None], other=0.0).to(tl.float32) * tl.load(s2)
            y += tl.load(b3 + source, mask=mine & (at == 3)[:, None], other=0.0).to(tl.float32) * tl.load(s3)
            stored = (out < outputs)[:, None] & (column < every)[None, :]
            tl.store(up + out[:, None] * every + column[None, :], y.to(up.dtype.element_ty), mask=stored)

    return pack


def _pack_on_cuda(
    strengths: list[Tensor],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    downs: tuple[Tensor, ...],
    ups: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    count, (rank, inputs) = len(downs), downs[0].shape
    padded = padded_rank(rank)
    every, outputs = count * padded, sum(widths)
    down, up = downs[0].new_empty(every, inputs, dtype=dtype), downs[0].new_empty(outputs, every, dtype=dtype)
    ends = [*[sum(widths[: i + 1]) for i in range(count)][:-1], *[outputs] * MOST][: MOST - 1]

    def four(tensors: list[Tensor]) -> list[Tensor]:
        return [*tensors, *[tensors[0]] * MOST][:MOST]

    given = [x.contiguous() for x in downs], [x.contiguous() for x in ups]
    with torch.cuda.device(down.device):
        _kernel()[(every - (-outputs // 64), -(-inputs // WIDE))](
            *four(given[0]), *four(given[1]), *four(strengths), down, up, rank, padded, every, inputs, outputs, *ends,
            columns=1 << (every - 1).bit_length(), size=WIDE, num_warps=4,
        )  # fmt: skip
    return down, up
