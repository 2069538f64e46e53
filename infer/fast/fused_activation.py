"""A block's MLP between its products: the activation, behind attention's output where one product reads both."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.fused_heads import Rows

WIDE = 1024  # columns a program


class _Activated(torch.autograd.Function):
    """attended [batch, tokens, width] or None, hidden [batch, tokens, n] -> [batch, tokens, width + n], or n / 2 for
    swiglu: its first half the gate (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, kind: str, attended: Tensor | None, hidden: Tensor, rows: Rows | None, start: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.kind, ctx.rows, ctx.start = kind, rows, start
        ctx.width = 0 if attended is None else attended.shape[2]
        return forward(kind, attended, hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        if ctx.rows is None:
            into = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        else:
            shape = *hidden.shape[:2], ctx.start + hidden.shape[2]
            ctx.rows.whole = hidden.new_empty(shape)
            into = ctx.rows.whole[..., ctx.start :]
        passed = backward(ctx.kind, hidden, gradient, ctx.width, into)
        return None, passed, into, None, None


def activated(
    kind: str, hidden: Tensor, attended: Tensor | None = None, rows: Rows | None = None, start: int = 0
) -> Tensor:
    """The activation (gelu, the tanh form, or swiglu) of hidden [batch, tokens, n], behind attended if it is given.

    rows, start: hidden is the columns from `start` on of a product, whose gradient is written there.
    """
    found: Tensor = _Activated.apply(kind, attended, hidden, rows, start)
    return found


def _value(kind: str, hidden: Tensor) -> Tensor:
    x = hidden.float()
    if kind == "gelu":
        return functional.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def forward(kind: str, attended: Tensor | None, hidden: Tensor) -> Tensor:
    if hidden.is_cuda:
        return _forward_on_cuda(kind, attended, hidden)
    y = _value(kind, hidden).to(hidden.dtype)
    return y if attended is None else torch.cat([attended, y], dim=-1)


def backward(kind: str, hidden: Tensor, gradient: Tensor, width: int, into: Tensor) -> Tensor | None:
    """Write hidden's gradient; returns attended's, in one piece."""
    if hidden.is_cuda:
        return _backward_on_cuda(kind, hidden, gradient, width, into)
    with torch.enable_grad():
        x = hidden.detach().float().requires_grad_()
        (own,) = torch.autograd.grad(_value(kind, x), x, gradient[..., width:].float())
    into.copy_(own)
    return gradient[..., :width].contiguous() if width else None


@lru_cache
def _kernels() -> tuple[Any, Any]:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def activation_forward(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        attended, hidden, out, width, columns, attended_row, hidden_row, out_row, copies,
        gelu: tl.constexpr, size: tl.constexpr,
    ) -> None:  # fmt: skip
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        if part < copies:
            column = part * size + tl.arange(0, size)
            within = column < width
            copied = tl.load(attended + row * attended_row + column, mask=within)
            tl.store(out + row * out_row + column, copied, mask=within)
        else:
            column = (part - copies) * size + tl.arange(0, size)
            within = column < columns
            x = tl.load(hidden + row * hidden_row + column, mask=within, other=0.0).to(tl.float32)
            if gelu:
                y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            else:
                up = tl.load(hidden + row * hidden_row + columns + column, mask=within, other=0.0).to(tl.float32)
                y = x * tl.sigmoid(x) * up
            tl.store(out + row * out_row + width + column, y.to(out.dtype.element_ty), mask=within)

    @triton.jit
    def activation_backward(  # type: ignore[no-untyped-def]
        hidden, gradient, passed, into, width, columns, hidden_row, gradient_row, into_row, copies,
        gelu: tl.constexpr, size: tl.constexpr,
    ) -> None:  # fmt: skip
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        if part < copies:
            column = part * size + tl.arange(0, size)
            within = column < width
            copied = tl.load(gradient + row * gradient_row + column, mask=within)
            tl.store(passed + row * width + column, copied, mask=within)
        else:
            column = (part - copies) * size + tl.arange(0, size)
            within = column < columns
            g = tl.load(gradient + row * gradient_row + width + column, mask=within, other=0.0).to(tl.float32)
            x = tl.load(hidden + row * hidden_row + column, mask=within, other=0.0).to(tl.float32)
            if gelu:
                s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
                g *= s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
            else:
                s = tl.sigmoid(x)
                up = tl.load(hidden + row * hidden_row + columns + column, mask=within, other=0.0).to(tl.float32)
                of_up = (g * x * s).to(into.dtype.element_ty)
                tl.store(into + row * into_row + columns + column, of_up, mask=within)
                g *= up * s * (1 + x * (1 - s))
            tl.store(into + row * into_row + column, g.to(into.dtype.element_ty), mask=within)

    return activation_forward, activation_backward


def _rows(x: Tensor) -> Tensor:
    """x [batch, tokens, n] whose rows are equally far apart, as it is or as a copy."""
    apart = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if apart else x.contiguous()


def _forward_on_cuda(kind: str, attended: Tensor | None, hidden: Tensor) -> Tensor:
    hidden = _rows(hidden)
    width = 0 if attended is None else attended.shape[2]
    given = hidden if attended is None else _rows(attended)
    columns = hidden.shape[2] // (1 if kind == "gelu" else 2)
    out = hidden.new_empty(*hidden.shape[:2], width + columns)
    copies = -(-width // WIDE)
    with torch.cuda.device(hidden.device):
        _kernels()[0][(out.shape[0] * out.shape[1], copies - (-columns // WIDE))](
            given, hidden, out, width, columns, given.stride(1), hidden.stride(1), out.stride(1), copies,
            gelu=kind == "gelu", size=WIDE, num_warps=4,
        )  # fmt: skip
    return out


def _backward_on_cuda(kind: str, hidden: Tensor, gradient: Tensor, width: int, into: Tensor) -> Tensor | None:
    hidden, gradient = _rows(hidden), _rows(gradient)
    passed = gradient.new_empty(*gradient.shape[:2], width) if width else gradient
    columns = hidden.shape[2] // (1 if kind == "gelu" else 2)
    copies = -(-width // WIDE)
    with torch.cuda.device(hidden.device):
        _kernels()[1][(gradient.shape[0] * gradient.shape[1], copies - (-columns // WIDE))](
            hidden, gradient, passed, into, width, columns, hidden.stride(1), gradient.stride(1), into.stride(1),
            copies, gelu=kind == "gelu", size=WIDE, num_warps=4,
        )  # fmt: skip
    return passed if width else None
