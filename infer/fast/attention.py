"""Attention whose gradient is the same, bit for bit, every time.

The fast backward kernels (cuDNN's, flash attention's) add up the gradient of q in the order in which their parts happen
to be done. Here each tile of a gradient is summed by one program in a fixed order: k's and v's in one kernel, q's in
another, which computes the scores a second time instead. The forward pass is the fast one, which has no such sums.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
LOW = (torch.bfloat16, torch.float16)


def _fast(q: Tensor) -> bool:
    """Whether the kernels below are made for these queries."""
    width = q.shape[-1]
    if not q.is_cuda or q.dtype not in LOW or width & (width - 1) or not 16 <= width <= 128:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8  # flash attention's forward pass asks for that


def like(q: Tensor) -> Tensor:
    """An empty tensor of q's shape [batch, heads, tokens, width], of which a token's heads lie behind each other."""
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


@torch.library.custom_op("flux_lora::attention", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of q, k, v [batch, heads, tokens, width] and the logsumexp of each query's scaled scores
    [batch, heads, tokens] in fp32, by the kernel that torch takes for it."""
    if _fast(q):
        # cuDNN's is torch's own choice on these cards, and twice as quick there
        if torch.cuda.get_device_capability(q.device)[0] in (9, 10):
            out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        else:
            out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    elif q.is_cuda:
        scores = (q.float() @ k.float().mT) / math.sqrt(q.shape[-1])
        logsumexp = scores.logsumexp(-1)
        out = (torch.exp(scores - logsumexp[..., None]) @ v.float()).to(q.dtype)
    else:
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    laid_out = out if out.transpose(1, 2).is_contiguous() else like(q).copy_(out)
    return laid_out, logsumexp.float().view(q.shape[:-1]).contiguous()


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor
        out, logsumexp = attention_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        delta = (gradient.float() * out.float()).sum(-1)
        parts: tuple[Tensor, Tensor, Tensor] = attention_gradient(gradient, q, k, v, logsumexp, delta)
        return parts


def repeatable_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k, v [batch, heads, tokens, width], like q."""
    out: Tensor = _Attention.apply(q, k, v)
    return out


@torch.library.custom_op("flux_lora::attention_gradient", mutates_args=())
def attention_gradient(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v [batch, heads, tokens, width], each laid out as [batch, tokens, heads, width].

    logsumexp: of each query's scaled scores; delta: of each query, the sum of output times gradient; both [batch,
    heads, tokens] in fp32.
    """
    if _fast(q):
        return _on_cuda(gradient, q, k, v, logsumexp, delta)
    scale = 1 / math.sqrt(q.shape[-1])
    a, b, c, g = (x.float() for x in (q, k, v, gradient))
    share = torch.exp(scale * (a @ b.mT) - logsumexp[..., None])
    inner = scale * share * (g @ c.mT - delta[..., None])
    parts = [like(q) for _ in range(3)]
    for part, value in zip(parts, (inner @ b, inner.mT @ a, share.mT @ g), strict=True):
        part.copy_(value)
    return parts[0], parts[1], parts[2]


@attention_gradient.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(q), like(q)


@lru_cache
def _kernels() -> tuple[Any, Any]:
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def of_keys(  # type: ignore[no-untyped-def]  # Triton takes `Any` here for a variable of the kernel's
        g, q, k, v, lse, delta, dk, dv, tokens, heads,
        gb, gh, gt, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
        scale, width: tl.constexpr, tile: tl.constexpr, step: tl.constexpr, whole: tl.constexpr,
    ) -> None:  # fmt: skip
        batch, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
        column = tl.arange(0, width)
        own = tl.program_id(0) * tile + tl.arange(0, tile)
        mine = (own < tokens)[:, None]
        keys = tl.load(k + batch * kb + head * kh + own[:, None] * kt + column[None, :], mask=mine, other=0.0)
        values = tl.load(v + batch * vb + head * vh + own[:, None] * vt + column[None, :], mask=mine, other=0.0)
        q += batch * qb + head * qh
        g += batch * gb + head * gh
        lse += tl.program_id(1).to(tl.int64) * tokens
        delta += tl.program_id(1).to(tl.int64) * tokens
        of_k = tl.zeros([tile, width], dtype=tl.float32)
        of_v = tl.zeros([tile, width], dtype=tl.float32)
        for start in range(0, tokens, step):
            other = start + tl.arange(0, step)
            if whole:
                query = tl.load(q + other[:, None] * qt + column[None, :])
                out = tl.load(g + other[:, None] * gt + column[None, :])
                most, inner = tl.load(lse + other), tl.load(delta + other)
            else:
                inside = other < tokens
                query = tl.load(q + other[:, None] * qt + column[None, :], mask=inside[:, None], other=0.0)
                out = tl.load(g + other[:, None] * gt + column[None, :], mask=inside[:, None], other=0.0)
                most = tl.load(lse + other, mask=inside, other=float("inf"))
                inner = tl.load(delta + other, mask=inside, other=0.0)
            scores = tl.dot(keys, tl.trans(query))
            share = tl.exp2(scores * (scale * 1.4426950408889634) - (most * 1.4426950408889634)[None, :])
            of_v = tl.dot(share.to(out.dtype), out, of_v)
            change = share * (tl.dot(values, tl.trans(out)) - inner[None, :])
            of_k = tl.dot(change.to(query.dtype), query, of_k)
        place = batch * ob + head * oh + own[:, None] * ot + column[None, :]
        tl.store(dk + place, (of_k * scale).to(keys.dtype), mask=mine)
        tl.store(dv + place, of_v.to(keys.dtype), mask=mine)

    @triton.jit
    def of_queries(  # type: ignore[no-untyped-def]
        g, q, k, v, lse, delta, dq, tokens, heads,
        gb, gh, gt, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
        scale, width: tl.constexpr, tile: tl.constexpr, step: tl.constexpr, whole: tl.constexpr,
    ) -> None:  # fmt: skip
        batch, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
        column = tl.arange(0, width)
        own = tl.program_id(0) * tile + tl.arange(0, tile)
        mine = (own < tokens)[:, None]
        query = tl.load(q + batch * qb + head * qh + own[:, None] * qt + column[None, :], mask=mine, other=0.0)
        out = tl.load(g + batch * gb + head * gh + own[:, None] * gt + column[None, :], mask=mine, other=0.0)
        at = tl.program_id(1).to(tl.int64) * tokens + own
        most = tl.load(lse + at, mask=own < tokens, other=float("inf"))
        inner = tl.load(delta + at, mask=own < tokens, other=0.0)
        k += batch * kb + head * kh
        v += batch * vb + head * vh
        of_q = tl.zeros([tile, width], dtype=tl.float32)
        for start in range(0, tokens, step):
            other = start + tl.arange(0, step)
            if whole:
                keys = tl.load(k + other[:, None] * kt + column[None, :])
                values = tl.load(v + other[:, None] * vt + column[None, :])
            else:
                inside = (other < tokens)[:, None]
                keys = tl.load(k + other[:, None] * kt + column[None, :], mask=inside, other=0.0)
                values = tl.load(v + other[:, None] * vt + column[None, :], mask=inside, other=0.0)
            scores = tl.dot(query, tl.trans(keys))
            share = tl.exp2(scores * (scale * 1.4426950408889634) - (most * 1.4426950408889634)[:, None])
            change = share * (tl.dot(out, tl.trans(values)) - inner[:, None])
            # a key beyond the last one is 0, and adds nothing
            of_q = tl.dot(change.to(keys.dtype), keys, of_q)
        place = batch * ob + head * oh + own[:, None] * ot + column[None, :]
        tl.store(dq + place, (of_q * scale).to(query.dtype), mask=mine)

    return of_keys, of_queries


# measured on an H100 (torch 2.11, Triton 3.6), 24 heads of 128: 1.04 and 0.69 ms at 4,608 tokens, 0.18 and 0.14 at
# 1,536; cuDNN's own backward takes 1.37 at 4,608
TILES = {"keys": (64, 64, 4, 2), "queries": (128, 64, 8, 3)}  # tile, step, warps, stages


def _on_cuda(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    gradient, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (gradient, q, k, v))
    logsumexp, delta = logsumexp.contiguous(), delta.contiguous()
    parts = like(q), like(q), like(q)
    strides = [s for x in (gradient, q, k, v, parts[0]) for s in x.stride()[:3]]
    scale, pair = 1 / math.sqrt(width), batch * heads
    with torch.cuda.device(q.device):
        for kernel, name, out in zip(_kernels(), TILES, (parts[1:], parts[:1]), strict=True):
            tile, step, warps, stages = TILES[name]
            kernel[(-(-tokens // tile), pair)](
                gradient, q, k, v, logsumexp, delta, *out, tokens, heads, *strides, scale,
                width=width, tile=tile, step=step, whole=tokens % step == 0, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return parts
