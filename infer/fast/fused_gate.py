"""A block's last step, streams + gate * what its last product gave, in one pass; and its gradient likewise."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infer.fast.stream_rows import stream_rows

WIDE = 1024  # columns a program


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, y: Tensor, value: bool, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate  # of the modulation, which learns nothing here
        if not value:
            return tuple(torch.empty_like(x) for x in streams)
        return forward(gate, y, streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, backward(ctx.gate, gradients), None, *gradients


def gated(gate: Tensor, y: Tensor, streams: tuple[Tensor, ...], value: bool = True) -> tuple[Tensor, ...]:
    """Each of the streams [batch, tokens, width], behind each other as y [batch, all tokens, width] is, plus gate
    [batch, width] times its part of y. value: whether the sums are wanted, and not their gradients alone."""
    if gate.requires_grad:
        parts = y.split([x.shape[1] for x in streams], dim=1)
        return tuple(x + gate[:, None] * part for x, part in zip(streams, parts, strict=True))
    found: tuple[Tensor, ...] = _Gated.apply(gate, y, value, *streams)
    return found


def forward(gate: Tensor, y: Tensor, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if y.is_cuda:
        given = [x.contiguous() for x in streams]
        out = [torch.empty_like(x) for x in given]
        _launch(0, gate, y.contiguous(), (given[0], given[-1]), (out[0], out[-1]))
        return tuple(out)
    parts = y.split([x.shape[1] for x in streams], dim=1)
    by = gate.float()[:, None]
    return tuple((x.float() + by * part.float()).to(x.dtype) for x, part in zip(streams, parts, strict=True))


def backward(gate: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
    if not gradients[0].is_cuda:
        return (torch.cat(gradients, dim=1).float() * gate.float()[:, None]).to(gradients[0].dtype)
    given = [x.contiguous() for x in gradients]
    tokens = sum(x.shape[1] for x in given)
    out = given[0].new_empty(len(gate), tokens, gate.shape[1])
    _launch(1, gate, out, (given[0], given[-1]), ())
    return out


@lru_cache
def _kernels() -> tuple[Any, Any]:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    load_row, store_row = stream_rows()

    @triton.jit(do_not_specialize=["early", "tokens"])
    def gate_forward(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        first, second, gate, y, out_first, out_second, early, tokens, width, gate_row, size: tl.constexpr
    ) -> None:
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * size + tl.arange(0, size)
        within = column < width
        x = load_row(first, second, row, column, within, early, tokens, width)
        by = tl.load(gate + row // tokens * gate_row + column, mask=within, other=0.0).to(tl.float32)
        x += by * tl.load(y + row * width + column, mask=within, other=0.0).to(tl.float32)
        store_row(out_first, out_second, x, row, column, within, early, tokens, width)

    @triton.jit(do_not_specialize=["early", "tokens"])
    def gate_backward(  # type: ignore[no-untyped-def]
        first, second, gate, y, early, tokens, width, gate_row, size: tl.constexpr
    ) -> None:
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * size + tl.arange(0, size)
        within = column < width
        g = load_row(first, second, row, column, within, early, tokens, width)
        g *= tl.load(gate + row // tokens * gate_row + column, mask=within, other=0.0).to(tl.float32)
        tl.store(y + row * width + column, g.to(y.dtype.element_ty), mask=within)

    return gate_forward, gate_backward


def _launch(which: int, gate: Tensor, y: Tensor, given: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    batch, tokens, width = y.shape
    assert gate.stride(1) == 1
    with torch.cuda.device(y.device):
        _kernels()[which][(batch * tokens, -(-width // WIDE))](
            *given, gate, y, *out, given[0].shape[1], tokens, width, gate.stride(0), size=WIDE, num_warps=4
        )
