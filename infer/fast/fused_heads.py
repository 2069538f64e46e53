"""From a product's outputs to attention's inputs: q and k are normed and rotated head by head, in one pass.

Text and picture have products and norms of their own in blocks of two streams; what they give stands behind each other
in q, k and v. The gradient of a product is one tensor, of which q's, k's and v's are columns; what lies behind these,
the MLP's part in blocks of one stream, is written there by the activation's gradient (infer/fast/fused_activation.py).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6


class Rows:
    """The gradient of a product [batch, tokens, columns], of which two operators write their columns."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None

    def taken(self, like: Tensor) -> Tensor:
        """The tensor, for the last that writes to it."""
        whole, self.whole = self.whole, None
        return torch.empty_like(like, memory_format=torch.contiguous_format) if whole is None else whole


class Heads(NamedTuple):
    """How products become heads."""

    heads: int
    norms: tuple[Tensor, ...]  # of q and k, for each product
    cos: Tensor  # [tokens, head width] in fp32, of all products' tokens
    sin: Tensor


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Heads, rows: Rows | None, *products: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*products)
        ctx.how, ctx.rows = how, rows
        q, k, v = forward(how, products)
        rest = products[0][..., 3 * _width(how) :]
        return (q, k, v, rest) if rows is not None else (q, k, v)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, rest: Tensor | None = None) -> tuple[Any, ...]:
        products, how, rows = ctx.saved_tensors, ctx.how, ctx.rows
        out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in products[rows is not None :]]
        if rows is not None:
            assert rest is not None
            whole, width = rows.taken(products[0]), 3 * _width(how)
            if rest.data_ptr() != whole[..., width:].data_ptr():  # nobody wrote it there
                whole[..., width:] = rest
            out.insert(0, whole)
        backward(how, products, (dq, dk, dv), out)
        return None, None, *out


def heads_of(how: Heads, *products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [batch, all tokens, heads, head width] of products [batch, tokens, 3 * width]."""
    q, k, v = _Heads.apply(how, None, *products)
    return q, k, v


def heads_and_rest(how: Heads, product: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of a product [batch, tokens, columns] that begins with them, and its other columns; rows: where the
    gradient of those is written."""
    q, k, v, rest = _Heads.apply(how, rows, product)
    return q, k, v, rest


def _width(how: Heads) -> int:
    return how.heads * how.cos.shape[1]


def forward(how: Heads, products: tuple[Tensor, ...]) -> list[Tensor]:
    width = _width(how)
    batch, tokens = products[0].shape[0], sum(x.shape[1] for x in products)
    shape = batch, tokens, how.heads, width // how.heads
    joined = len(products) > 1
    out = [products[0].new_empty(shape) for _ in range(3 if joined else 2)]
    start = 0
    for i, x in enumerate(products):
        if x.is_cuda:
            _launch_forward(how, i, x, out, start)
        else:
            for j, part in enumerate(x[..., : len(out) * width].split(width, dim=-1)):
                part = part.unflatten(-1, (how.heads, -1)).float()
                if j < 2:
                    part = _normed(part, how.norms[2 * i + j])
                    part = _rotated(part, *(x[start : start + part.shape[1]] for x in (how.cos, how.sin)))
                out[j][:, start : start + x.shape[1]] = part
        start += x.shape[1]
    return out if joined else [*out, products[0][..., 2 * width : 3 * width].unflatten(-1, (how.heads, -1))]


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return x * cos[None, :, None] + turned * sin[None, :, None]


def backward(how: Heads, products: tuple[Tensor, ...], gradients: tuple[Tensor, ...], out: list[Tensor]) -> None:
    """Write the gradients of the products' first columns."""
    width, start = _width(how), 0
    for i, (x, into) in enumerate(zip(products, out, strict=True)):
        here = slice(start, start + x.shape[1])
        if x.is_cuda:
            _launch_backward(how, i, x, gradients, into, start)
        else:
            for j, g in enumerate(gradients):
                g = g[:, here].float()
                if j < 2:
                    weight = how.norms[2 * i + j].float()
                    own = x[..., j * width : (j + 1) * width].unflatten(-1, (how.heads, -1)).float()
                    inverse = torch.rsqrt(own.square().mean(-1, keepdim=True) + EPSILON)
                    g = _turned_back(g, how.cos[here], how.sin[here]) * weight
                    g = inverse * (g - own * inverse.square() * (g * own).mean(-1, keepdim=True))
                into[..., j * width : (j + 1) * width] = g.flatten(2)
        start += x.shape[1]


def _turned_back(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of what was rotated."""
    real, imaginary = (g * sin[None, :, None]).unflatten(-1, (-1, 2)).unbind(-1)
    return g * cos[None, :, None] + torch.stack([imaginary, -real], dim=-1).flatten(-2)


@lru_cache
def _kernels() -> tuple[Any, Any]:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "every", "start"])
    def heads_forward(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        given, norm_q, norm_k, cos, sin, q, k, v, columns, tokens, every, start, heads, each, epsilon,
        with_v: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        batch, token = row // tokens, row % tokens
        head, column = tl.arange(0, tall), tl.arange(0, wide)
        within = (head < heads)[:, None] & (column < each)[None, :]
        cell = head[:, None] * each + column[None, :]
        source = given + row * columns + cell
        target = (batch * every + start + token) * (heads * each) + cell
        angle = (start + token) * each + column
        c = tl.load(cos + angle, mask=column < each, other=0.0)
        s = tl.load(sin + angle, mask=column < each, other=0.0)
        s_real, s_imaginary = tl.split(tl.reshape(s, (wide // 2, 2)))
        for part in tl.static_range(2):
            x = tl.load(source + part * heads * each, mask=within, other=0.0).to(tl.float32)
            norm = tl.load((norm_q if part == 0 else norm_k) + column, mask=column < each, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, 1) / each + epsilon)[:, None] * norm[None, :]
            real, imaginary = tl.split(tl.reshape(x, (tall, wide // 2, 2)))
            turned = tl.join(-imaginary * s_real[None, :], real * s_imaginary[None, :])
            y = x * c[None, :] + tl.reshape(turned, (tall, wide))
            tl.store((q if part == 0 else k) + target, y.to(q.dtype.element_ty), mask=within)
        if with_v:
            tl.store(v + target, tl.load(source + 2 * heads * each, mask=within), mask=within)

    @triton.jit(do_not_specialize=["tokens", "start"])
    def heads_backward(  # type: ignore[no-untyped-def]
        given, norm_q, norm_k, cos, sin, dq, dk, dv, out, columns, tokens, start, heads, each, epsilon,
        qb, qt, qh, kb, kt, kh, vb, vt, vh, tall: tl.constexpr, wide: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        batch, token = row // tokens, row % tokens
        head, column = tl.arange(0, tall), tl.arange(0, wide)
        within = (head < heads)[:, None] & (column < each)[None, :]
        cell = row * columns + head[:, None] * each + column[None, :]
        angle = (start + token) * each + column
        c = tl.load(cos + angle, mask=column < each, other=0.0)
        s = tl.load(sin + angle, mask=column < each, other=0.0)
        s_real, s_imaginary = tl.split(tl.reshape(s, (wide // 2, 2)))
        for part in tl.static_range(2):
            x = tl.load(given + part * heads * each + cell, mask=within, other=0.0).to(tl.float32)
            norm = tl.load((norm_q if part == 0 else norm_k) + column, mask=column < each, other=0.0).to(tl.float32)
            if part == 0:
                place = dq + batch * qb + (start + token) * qt + head[:, None] * qh
            else:
                place = dk + batch * kb + (start + token) * kt + head[:, None] * kh
            g = tl.load(place + column[None, :], mask=within, other=0.0).to(tl.float32)
            real, imaginary = tl.split(tl.reshape(g, (tall, wide // 2, 2)))
            turned = tl.join(imaginary * s_imaginary[None, :], -real * s_real[None, :])
            g = (g * c[None, :] + tl.reshape(turned, (tall, wide))) * norm[None, :]
            inverse = tl.rsqrt(tl.sum(x * x, 1) / each + epsilon)
            along = inverse * inverse * (tl.sum(g * x, 1) / each)
            g = inverse[:, None] * (g - x * along[:, None])
            tl.store(out + part * heads * each + cell, g.to(out.dtype.element_ty), mask=within)
        place = dv + batch * vb + (start + token) * vt + head[:, None] * vh + column[None, :]
        tl.store(out + 2 * heads * each + cell, tl.load(place, mask=within), mask=within)

    return heads_forward, heads_backward


def _tile(how: Heads) -> dict[str, int]:
    heads, each = how.heads, how.cos.shape[1]
    return {"tall": 1 << (heads - 1).bit_length(), "wide": 1 << (each - 1).bit_length(), "num_warps": 8}


def _launch_forward(how: Heads, i: int, x: Tensor, out: list[Tensor], start: int) -> None:
    assert x.is_contiguous() and how.cos.is_contiguous() and how.sin.is_contiguous()
    each = how.cos.shape[1]
    with torch.cuda.device(x.device):
        _kernels()[0][(x.shape[0] * x.shape[1],)](
            x, how.norms[2 * i], how.norms[2 * i + 1], how.cos, how.sin, out[0], out[1], out[-1], x.shape[2],
            x.shape[1], out[0].shape[1], start, how.heads, each, EPSILON, with_v=len(out) > 2, **_tile(how),
        )  # fmt: skip


def _launch_backward(how: Heads, i: int, x: Tensor, gradients: tuple[Tensor, ...], into: Tensor, start: int) -> None:
    given = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients]
    strides = [stride for g in given for stride in g.stride()[:3]]
    each = how.cos.shape[1]
    with torch.cuda.device(x.device):
        _kernels()[1][(x.shape[0] * x.shape[1],)](
            x, how.norms[2 * i], how.norms[2 * i + 1], how.cos, how.sin, *given, into, x.shape[2], x.shape[1], start,
            how.heads, each, EPSILON, *strides, **_tile(how),
        )  # fmt: skip
