"""Layers that read one input as one product, with the adapters' updates in it: without a compiler.

Updates are added in place to the product, and to the gradient of the input; or, up to the rank that infer/fast/fold.py
names, to quantized weights as these are dequantized.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.add_product import add_product
from infer.fast.eight_bit import product
from infer.fast.fold import folded, folds
from infer.fast.fused_gain import gain_backward, gain_of, has_gain
from infer.fast.thin import Thin, thin_of
from infer.fast.weights import Linear, Stack


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
        """weights: W, with the update where it folds; None: made here and for the gradient, and not kept between.
        down, up: those of `thin`; gain: of the outputs that it reaches, None for 1."""
        fold = gain is None and folds(frozen, thin)
        ctx.frozen, ctx.thin, ctx.weights, ctx.fold = frozen, thin, weights, fold
        learns = down is not None and any(ctx.needs_input_grad[4:6])
        value = value or ctx.needs_input_grad[6]  # the gains' gradient is read from it
        bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
        if not value:
            y = x.new_empty(*x.shape[:-1], frozen.shape[0])
        elif frozen.eight is not None:
            y = product(x, frozen, across=False, bias=bias)
        else:
            if weights is None:
                weights = _weights(frozen, thin if fold else None, x.dtype)
            y = functional.linear(x, weights, bias)
        inner = None
        if thin is not None and down is not None and (learns or (value and not fold)):
            inner = functional.linear(x, down)
            if value and not fold:
                reached = slice(thin.first, thin.first + thin.up.shape[0])
                add_product(y[..., reached], inner, thin.up, gain, None if bias is None else bias[reached])
        held = y if ctx.needs_input_grad[6] else None
        ctx.save_for_backward(*((x, inner) if learns else (None, None)), gain, held)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x, inner, gain, y), thin, frozen, fold = ctx.saved_tensors, ctx.thin, ctx.frozen, ctx.fold
        passed = across = of_down = of_up = of_gain = None
        if gain is not None:
            gradient, of_gain = gain_backward(gradient, y, gain, frozen.bias, thin.first)
        if thin is not None and (x is not None or not fold):
            part = gradient[..., thin.first : thin.first + thin.up.shape[0]]
            across = part @ thin.up
            if x is not None:
                of_up = part.flatten(0, -2).T @ inner.flatten(0, -2)
                of_down = across.flatten(0, -2).T @ x.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            if frozen.eight is not None:
                passed = product(gradient, frozen, across=True)
            else:
                weights = ctx.weights
                if weights is None:
                    weights = _weights(frozen, thin if fold else None, gradient.dtype, 1)
                passed = gradient @ weights
            if across is not None and not fold:
                add_product(passed, across, thin.down.T.contiguous())
        return passed, None, None, None, of_down, of_up, of_gain, None


def _weights(frozen: Stack, thin: Thin | None, dtype: torch.dtype, turn: int = 0) -> Tensor:
    return folded(frozen, thin if folds(frozen, thin) else None, dtype, turn)


def fused_linear(x: Tensor, layers: Linear, again: bool, value: bool = True) -> Tensor:
    """The layers' outputs [..., out], behind each other, for x [..., in], adapters included.

    again: the gradient is next, for which the dequantized weights are kept where `shared` says so. value: whether the
    outputs are wanted, and not their gradients alone.
    """
    frozen, thin = layers.frozen, thin_of(layers, x.dtype)
    gained = thin is not None and has_gain(layers)
    weights = gain = None
    if frozen.eight is not None:
        pass  # each product takes a layout of its own
    elif frozen.kind == "plain" and frozen.stored.dtype == x.dtype:
        weights = frozen.stored
    elif (again and frozen.shared) or (gained and not torch.is_grad_enabled()):
        with torch.no_grad():
            weights = _weights(frozen, None if gained else thin, x.dtype)
    down, up = (None, None) if thin is None else (thin.down, thin.up)
    held = None if thin is None else thin._replace(down=thin.down.detach(), up=thin.up.detach())
    if gained:
        assert held is not None
        gain = gain_of(layers, held, weights, x.dtype)
    y: Tensor = _Linear.apply(x, frozen, weights, held, down, up, gain, value)
    return y
