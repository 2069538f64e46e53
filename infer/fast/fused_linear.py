"""Layers that read one input as one product, with the adapters' updates in it: without a compiler.

In training, updates are added in place to the product, and to the gradient of the input. Where no gradient is asked
for, those of layers that read a norm may be further columns of what is summed over: [x, x down^T] times [W, up]^T.
That is one product, where adding to it reads and writes it once more; and an update is added in fp32, before the sum
is rounded, which a small one survives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.add_product import add_product
from infer.fast.eight_bit import product
from infer.fast.fused_gain import gain_backward, gain_of, has_gain
from infer.fast.thin import Thin, padded_rank, thin_of
from infer.fast.weights import Linear, Stack, dequantize_at_once

COLUMNS = 64  # further columns are a multiple of it, for the kernels of products
MOST = 4 * COLUMNS  # beyond it, adding to the product costs less


class _Linear(torch.autograd.Function):
    """(x W^T + x down^T up^T) gain + bias, with frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: Stack,
        weights: Tensor | None,
        thin: Thin | None,
        down: Tensor | None,
        up: Tensor | None,
        gain: Tensor | None,
        value: bool,
    ) -> Tensor:
        """weights: W; None: made here and for the gradient, and not kept between. down, up: those of `thin`; gain: of
        the outputs that it reaches, None for 1."""
        ctx.frozen, ctx.thin, ctx.weights = frozen, thin, weights
        learns = down is not None and any(ctx.needs_input_grad[4:6])
        value = value or gain is not None  # the gains' gradient is read from it
        bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
        if not value:
            y = x.new_empty(*x.shape[:-1], frozen.shape[0])
        elif frozen.eight is not None:
            y = product(x, frozen, across=False, bias=bias)
        else:
            y = functional.linear(x, dequantize_at_once(frozen, x.dtype) if weights is None else weights, bias)
        inner = None
        if thin is not None and down is not None and (learns or value):
            inner = functional.linear(x, down)
            if value:
                reached = slice(thin.first, thin.first + thin.up.shape[0])
                least = None if bias is None else bias[reached]
                add_product(y[..., reached], inner, thin.up, gain, least, list(thin.starts or ()))
        ctx.save_for_backward(*((x, inner) if learns else (None, None)), gain, None if gain is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x, inner, gain, y), thin, frozen = ctx.saved_tensors, ctx.thin, ctx.frozen
        passed = across = of_down = of_up = of_gain = None
        if gain is not None:
            gradient, of_gain = gain_backward(gradient, y, gain, frozen.bias, thin.first)
        if thin is not None:
            part = gradient[..., thin.first : thin.first + thin.up.shape[0]]
            across = part @ thin.up
            if x is not None:
                of_up = part.flatten(0, -2).T @ inner.flatten(0, -2)
                of_down = across.flatten(0, -2).T @ x.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            if frozen.eight is not None:
                passed = product(gradient, frozen, across=True)
            else:
                passed = gradient @ (dequantize_at_once(frozen, gradient.dtype) if ctx.weights is None else ctx.weights)
            if across is not None:
                add_product(passed, across, thin.down.T.contiguous())
        return passed, None, None, None, of_down, of_up, of_gain, None


def spare_columns(layers: Linear) -> int:
    """How many columns behind the layers' input take their adapters' part of it, where no gradient is asked for; 0
    where their updates are added to the product."""
    adapted = [i for i, adapters in enumerate(layers.adapters) if adapters]
    quantized = layers.frozen.kind != "plain" and layers.frozen.eight is None
    if not adapted or not quantized or has_gain(layers):
        return 0
    return spare_of([lora.down.shape[0] for adapters in layers.adapters for lora in adapters])


def spare_of(ranks: list[int]) -> int:
    """The columns for adapters of such ranks; 0 where they are too high."""
    spare = -(-sum(padded_rank(rank) for rank in ranks) // COLUMNS) * COLUMNS
    return spare if spare <= MOST else 0


def fused_linear(x: Tensor, layers: Linear, again: bool, value: bool = True) -> Tensor:
    """The layers' outputs [..., out], behind each other, for x [..., in], adapters included.

    x may have `spare_columns` behind its values, which are written here. again: the gradient is next, for which the
    dequantized weights are kept where `shared` says so. value: whether the outputs are wanted, and not their gradients
    alone.
    """
    frozen, thin = layers.frozen, thin_of(layers, x.dtype)
    if x.shape[-1] > frozen.shape[1]:
        assert thin is not None
        return _one_product(x, frozen, thin)
    gained = thin is not None and has_gain(layers)
    weights = gain = None
    if frozen.eight is not None:
        pass  # each product takes a layout of its own
    elif frozen.kind == "plain" and frozen.stored.dtype == x.dtype:
        weights = frozen.stored
    elif (again and frozen.shared) or (gained and not torch.is_grad_enabled()):
        with torch.no_grad():
            weights = dequantize_at_once(frozen, x.dtype)
    down, up = (None, None) if thin is None else (thin.down, thin.up)
    held = None if thin is None else thin._replace(down=thin.down.detach(), up=thin.up.detach())
    if gained:
        assert held is not None
        gain = gain_of(layers, held, weights, x.dtype)
    y: Tensor = _Linear.apply(x, frozen, weights, held, down, up, gain, value)
    return y


def _one_product(x: Tensor, frozen: Stack, thin: Thin) -> Tensor:
    """The outputs for x [..., in + spare]; of its spare columns, those of the adapters' ranks are written, and the
    others are 0."""
    columns, rank = frozen.shape[1], thin.up.shape[1]
    spare = x.shape[-1] - columns
    weights = dequantize_at_once(frozen, x.dtype, spare)
    weights[:, columns:] = 0
    weights[thin.first : thin.first + thin.up.shape[0], columns : columns + rank] = thin.up
    down = functional.pad(thin.down, (0, 0, 0, spare - rank))
    x[..., columns:] = functional.linear(x[..., :columns], down)
    return functional.linear(x, weights, None if frozen.bias is None else frozen.bias.to(x.dtype))
