"""LayerNorm with a block's modulation: one pass forward, one pass backward, which adds the residual's gradient too.

The tokens may lie in two tensors, text and picture, that the norm reads as if they were one.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.stream_rows import stream_rows

EPSILON = 1e-6


class _Normed(torch.autograd.Function):
    """(shift, scale [batch, width], streams [batch, tokens, width]) -> the modulated norm of all tokens, and the
    streams as they are: their gradient by way of the residual comes back here, and is added in the same pass."""

    @staticmethod
    def forward(ctx: Any, shift: Tensor, scale: Tensor, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*streams)
        ctx.scale = scale  # of the modulation, which learns nothing here
        return forward(shift, scale, streams), *(x.view_as(x) for x in streams)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *beside: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *backward(gradient, ctx.scale, ctx.saved_tensors, beside)


def normed(shift: Tensor, scale: Tensor, *streams: Tensor, spare: int = 0) -> tuple[Tensor, ...]:
    """The modulated norm [batch, tokens, width] of all streams behind each other, and each stream for its residual.

    shift and scale [batch, width]; one stream, or two; [batch, tokens, width]. spare: columns behind the norm's that
    hold nothing yet, where nothing learns.
    """
    if spare:
        assert not torch.is_grad_enabled()
        return forward(shift, scale, streams, spare), *streams
    if shift.requires_grad or scale.requires_grad:
        x = torch.cat(streams, dim=1)
        normed = functional.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale[:, None]) + shift[:, None]
        return normed, *streams
    found: tuple[Tensor, ...] = _Normed.apply(shift, scale, *streams)
    return found


def forward(shift: Tensor, scale: Tensor, streams: tuple[Tensor, ...], spare: int = 0) -> Tensor:
    if streams[0].is_cuda:
        return _forward_on_cuda(shift, scale, streams, spare)
    x = torch.cat(streams, dim=1).float()
    y = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    y = (y * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(streams[0].dtype)
    return functional.pad(y, (0, spare)) if spare else y


def backward(
    gradient: Tensor, scale: Tensor, streams: tuple[Tensor, ...], beside: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    if gradient.is_cuda:
        return _backward_on_cuda(gradient, scale, streams, beside)
    x, g = torch.cat(streams, dim=1).float(), gradient.float() * (1 + scale.float()[:, None])
    x = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    x = x * inverse
    g = inverse * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    parts = g.split([each.shape[1] for each in streams], dim=1)
    return tuple((part + other.float()).to(gradient.dtype) for part, other in zip(parts, beside, strict=True))


@lru_cache
def _kernels() -> tuple[Any, Any]:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    load_row, store_row = stream_rows()

    @triton.jit(do_not_specialize=["early", "tokens"])
    def norm_forward(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        first, second, shift, scale, out, early, tokens, width, shift_row, scale_row, out_row, epsilon,
        size: tl.constexpr,
    ) -> None:  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, size)
        batch, within = row // tokens, column < width
        x = load_row(first, second, row, column, within, early, tokens, width)
        x = tl.where(within, x - tl.sum(x, 0) / width, 0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
        by = 1 + tl.load(scale + batch * scale_row + column, mask=within, other=0.0).to(tl.float32)
        y = x * by + tl.load(shift + batch * shift_row + column, mask=within, other=0.0).to(tl.float32)
        tl.store(out + row * out_row + column, y.to(out.dtype.element_ty), mask=within)

    @triton.jit(do_not_specialize=["early", "tokens"])
    def norm_backward(  # type: ignore[no-untyped-def]
        first, second, scale, gradient, beside_first, beside_second, out_first, out_second,
        early, tokens, width, scale_row, epsilon, size: tl.constexpr,
    ) -> None:  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, size)
        batch, within = row // tokens, column < width
        x = load_row(first, second, row, column, within, early, tokens, width)
        passed = load_row(beside_first, beside_second, row, column, within, early, tokens, width)
        g = tl.load(gradient + row * width + column, mask=within, other=0.0).to(tl.float32)
        g *= 1 + tl.load(scale + batch * scale_row + column, mask=within, other=0.0).to(tl.float32)
        x = tl.where(within, x - tl.sum(x, 0) / width, 0.0)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
        x *= inverse
        g = inverse * (g - tl.sum(g, 0) / width - x * (tl.sum(g * x, 0) / width)) + passed
        store_row(out_first, out_second, g, row, column, within, early, tokens, width)

    return norm_forward, norm_backward


def _size(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _forward_on_cuda(shift: Tensor, scale: Tensor, streams: tuple[Tensor, ...], spare: int) -> Tensor:
    first, second = (x.contiguous() for x in (streams[0], streams[-1]))
    batch, early, width = first.shape
    tokens = sum(x.shape[1] for x in streams)
    out = first.new_empty(batch, tokens, width + spare)
    assert shift.stride(1) == scale.stride(1) == 1
    with torch.cuda.device(first.device):
        _kernels()[0][(batch * tokens,)](
            first, second, shift, scale, out, early, tokens, width, shift.stride(0), scale.stride(0),
            width + spare, EPSILON, size=_size(width), num_warps=8,
        )  # fmt: skip
    return out


def _backward_on_cuda(
    gradient: Tensor, scale: Tensor, streams: tuple[Tensor, ...], beside: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    first, second = (x.contiguous() for x in (streams[0], streams[-1]))
    passed = [x.contiguous() for x in beside]
    gradient = gradient.contiguous()
    batch, early, width = first.shape
    tokens = gradient.shape[1]
    out = [torch.empty_like(x) for x in passed]
    with torch.cuda.device(gradient.device):
        _kernels()[1][(batch * tokens,)](
            first, second, scale, gradient, passed[0], passed[-1], out[0], out[-1], early, tokens, width,
            scale.stride(0), EPSILON, size=_size(width), num_warps=8,
        )  # fmt: skip
    return tuple(out)
