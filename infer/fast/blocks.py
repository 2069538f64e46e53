"""What the families' blocks are made of, as functions of plain tensors: the fast path of training and sampling.

diffusers' blocks call one layer after another. Here, the layers of a block that read the same input are one matrix
product (`infer/fast/weights.py`); LoRA's thin products read that input once; and the whole block, recomputation in the
backward pass included, is one function that torch.compile can fuse. The blocks themselves are in
`infer/fast/flux1_blocks.py` and `infer/fast/flux2_blocks.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.add_product import add_product
from infer.fast.attention import repeatable_attention
from infer.fast.eight_bit import product
from infer.fast.few_rows import few_rows_int8
from infer.fast.half import attend, scaled_product
from infer.fast.weights import Linear, Lora, Stack, dequantize


class _Product(torch.autograd.Function):
    """x W^T + bias, and the adapters' updates added to it in place, with frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Stack, weights: Tensor | None, thin: Tensor | None, up: Tensor | None, first: int
    ) -> Tensor:
        """weights: W; None: dequantized here and for the gradient, and not kept between. thin: what the adapters' A
        give; up: their B, of the outputs from `first` on."""
        bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
        if frozen.eight is not None:
            y = product(x, frozen, across=False)
        else:
            whole = dequantize(frozen, _dtype(frozen, x)) if weights is None else weights
            y = scaled_product(x, whole.T) if frozen.half else functional.linear(x, whole, bias)
        if thin is not None and up is not None:
            add_product(y[..., first : first + up.shape[0]], thin, up)
        if bias is not None and (frozen.half or frozen.eight is not None):
            y = y + bias  # compiled, it is a part of what reads y
        ctx.save_for_backward(weights, thin, up)
        ctx.frozen, ctx.first = frozen, first
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, thin, up = ctx.saved_tensors
        passed = None
        if ctx.needs_input_grad[0] and ctx.frozen.eight is not None:
            passed = product(gradient, ctx.frozen, across=True)
        elif ctx.needs_input_grad[0]:
            if weights is None:
                # a turn of its own: merged with the recomputation's, every layer's weights would wait for this moment
                weights = dequantize(ctx.frozen, _dtype(ctx.frozen, gradient), turn=1)
            passed = scaled_product(gradient, weights) if ctx.frozen.half else gradient @ weights
        if thin is None:
            return passed, None, None, None, None, None
        part = gradient[..., ctx.first : ctx.first + up.shape[0]]
        learned = part.flatten(0, -2).T @ thin.flatten(0, -2)
        return passed, None, None, part @ up, learned, None


def _dtype(frozen: Stack, x: Tensor) -> torch.dtype:
    """Of the weights in a product with x."""
    return torch.float16 if frozen.half else x.dtype


def linear(x: Tensor, layers: Linear) -> list[Tensor]:
    """Each layer's output [..., out] for x [..., in], adapters included."""
    frozen = layers.frozen
    dora = any(lora.magnitude is not None for adapters in layers.adapters for lora in adapters)
    weights = dequantize(frozen, _dtype(frozen, x)) if frozen.shared or dora else None
    downs = [_padded_rank(lora.down, 0) for adapters in layers.adapters for lora in adapters]
    thin = functional.linear(x, torch.cat(downs).to(x.dtype)) if downs else None
    if thin is not None and frozen.in_place and not dora:
        up, first = _up(layers)
        whole: Tensor = _Product.apply(x, frozen, weights, thin, up.to(x.dtype), first)
        return list(whole.split(frozen.widths, dim=-1))
    bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
    if weights is None or frozen.half or frozen.eight is not None:
        y = _Product.apply(x, frozen, weights if frozen.eight is None else None, None, None, 0)
    else:
        y = functional.linear(x, weights, bias)
    outputs = list(y.split(frozen.widths, dim=-1))
    if thin is None:
        return outputs
    thins = thin.split([down.shape[0] for down in downs], dim=-1)
    taken = row = 0
    for i, adapters in enumerate(layers.adapters):
        width = frozen.widths[i]
        for lora in adapters:
            update = functional.linear(thins[taken], _padded_rank(lora.up * lora.strength, 1).to(x.dtype))
            taken += 1
            if lora.magnitude is None:
                outputs[i] = outputs[i] + update
                continue
            assert weights is not None
            base = outputs[i] if bias is None else outputs[i] - bias[row : row + width]
            gain = (lora.magnitude.float() / _norms(weights[row : row + width], lora)).to(x.dtype)
            outputs[i] = outputs[i] + (gain - 1) * base + gain * update
        row += width
    return outputs


def _up(layers: Linear) -> tuple[Tensor, int]:
    """All adapters' B as one block-diagonal matrix [out, rank], and the output that it begins at."""
    adapted = [i for i, adapters in enumerate(layers.adapters) if adapters]
    first, end = adapted[0], adapted[-1] + 1
    widths = layers.frozen.widths[first:end]
    start, device = sum(layers.frozen.widths[:first]), layers.adapters[first][0].up.device
    ups = [
        torch.cat([_padded_rank(lora.up * lora.strength, 1) for lora in adapters], dim=1)
        if adapters
        else torch.zeros(width, 0, device=device)
        for width, adapters in zip(widths, layers.adapters[first:end], strict=True)
    ]
    rank, count = ups[0].shape[1], len(ups)
    if any(up.shape[1] != rank for up in ups):
        return torch.block_diag(*ups), start
    # the same as one expression, which compiles to one kernel
    row, column = torch.arange(sum(widths), device=device), torch.arange(count * rank, device=device)
    layer = sum((row >= sum(widths[: i + 1])).long() for i in range(count))
    own = layer[:, None] == (column // rank)[None]  # type: ignore[index]
    return torch.where(own, torch.cat(ups).repeat(1, count), 0.0), start


def _padded_rank(thin: Tensor, dimension: int) -> Tensor:
    """A or B with its rank filled with zeros to a multiple of 8, without which products fall to slow kernels."""
    missing = -thin.shape[dimension] % 8
    if not missing or not thin.is_cuda:
        return thin
    return functional.pad(thin, (0, missing) if dimension else (0, 0, 0, missing))


def modulation(x: Tensor, layers: Linear) -> Tensor:
    """One layer's output [batch, out] for x [batch, in] of few rows: weights are read as they are stored, and never
    rounded to 8 bits."""
    frozen = layers.frozen
    if (
        x.requires_grad
        or frozen.kind == "plain"
        or len(x) > 8
        or any(lora.magnitude is not None for lora in layers.adapters[0])
    ):
        return linear(x, layers._replace(frozen=frozen._replace(eight=None)))[0]
    assert frozen.scale is not None
    if frozen.kind == "int8":
        if torch.compiler.is_compiling():
            rows = [(frozen.stored.float() * row.float()).sum(1) for row in x]
            y = torch.stack(rows) * (frozen.scale / 127.0)
        else:
            y = few_rows_int8(x, frozen.stored, frozen.scale)
        y = (y if frozen.bias is None else y + frozen.bias).to(x.dtype)
    else:
        y = _few_rows_4bit(x, frozen)
    for lora in layers.adapters[0]:
        y = y + functional.linear(functional.linear(x, lora.down.to(x.dtype)), (lora.up * lora.strength).to(x.dtype))
    return y


def _few_rows_4bit(x: Tensor, frozen: Stack) -> Tensor:
    bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
    multiply = torch.ops.bitsandbytes.gemm_4bit
    if frozen.nested is None:
        y: Tensor = multiply(x, frozen.stored, list(frozen.shape), frozen.scale, 64, frozen.kind, bias)
        return y
    outer, code, offsets = frozen.nested
    y = multiply(x, frozen.stored, list(frozen.shape), outer, 64, frozen.kind, bias, frozen.scale, code, offsets[0])
    return y


def _norms(weights: Tensor, lora: Lora) -> Tensor:
    """Norms [out] of the rows of W + s B A, without forming B A; constants to the gradient (Liu et al. 2024, 4.3)."""
    # in fp32 whatever the adapter is stored in: W's own norm is that of the sum but for a small part
    down, up = lora.down.detach().float(), (lora.up.float() * lora.strength).detach()
    cross = functional.linear(down, weights.float()).T  # W A^T
    return (weights.float().square().sum(1) + 2 * (up * cross).sum(1) + ((up @ (down @ down.T)) * up).sum(1)).sqrt()


class _WholeGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous.

    cuDNN's backward plan is found again by the strides of q, k and v alone (torch 2.11, MHA.cpp): a gradient that is a
    slice, as after a concatenation, is then read with the strides of another block's, out of bounds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, half: bool, repeatable: bool) -> Tensor:
    """q, k, v [batch, tokens, heads, width] -> [batch, tokens, heads * width]; half: see infer/fast/half.py;
    repeatable: with a gradient that is the same every time."""
    multiply: Any = functional.scaled_dot_product_attention
    if half:
        multiply = attend
    elif repeatable:
        multiply = repeatable_attention
    out = multiply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    whole: Tensor = _WholeGradient.apply(out.transpose(1, 2).flatten(2))
    return whole


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As diffusers' RMSNorm, over the last dimension."""
    y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return y.to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [batch, tokens, heads, width]; cos and sin [tokens, width]."""
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    # (real, imaginary) turns to (-imaginary, real); a compiled flip is one more load, a stack is two and a choice
    sign = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1
    turned: Tensor = x.float() * cos[None, :, None] + partner.float() * (sin * sign)[None, :, None]
    return turned.to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
