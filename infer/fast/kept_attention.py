"""Attention, and what else is kept where the rest of a block is computed again in the backward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from infer.fast.attention import attention_forward, attention_gradient

aten = torch.ops.aten
CUDNN, FLASH, EFFICIENT = 3, 1, 2  # of torch's SDPBackend
_state = threading.local()
T = TypeVar("T")


class Kept:
    """What a block's attention gave, and its weights' norms, from its forward pass to the one that is made again."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.again = False

    @contextmanager
    def active(self, again: bool) -> Iterator[None]:
        """Within, what `noted` computes is noted down, or, again, taken from the notes."""
        before, self.again = getattr(_state, "kept", None), again
        _state.kept = self
        try:
            yield
        finally:
            _state.kept = before


def noted(compute: Callable[[], T]) -> T:
    """What `compute` gives; where a block is computed again, what it gave before, in the same order."""
    kept: Kept | None = getattr(_state, "kept", None)
    if kept is not None and kept.again:
        before: T = kept.found.pop(0)
        return before
    found = compute()
    if kept is not None:
        kept.found.append(found)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, repeatable: bool) -> Tensor:
        out, how = noted(lambda: _attend(q, k, v, repeatable))
        ctx.save_for_backward(q, k, v)
        ctx.out, ctx.how = out, how
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        return *_attend_back(gradient, q, k, v, ctx.out, ctx.how), None


def kept_attention(q: Tensor, k: Tensor, v: Tensor, repeatable: bool) -> Tensor:
    """q, k, v [batch, tokens, heads, width] -> [batch, tokens, heads * width]."""
    out: Tensor = _Attention.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), repeatable)
    return out.transpose(1, 2).flatten(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, repeatable: bool) -> tuple[Tensor, Any]:
    """The output, and a function's name with what else its gradient needs: by the kernel that torch chooses."""
    if repeatable:
        out, logs = attention_forward(q, k, v)
        return out, ("repeatable", logs)
    if not q.is_cuda:
        out, logs = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, ("cpu", logs)
    choice = torch._fused_sdp_choice(q, k, v)
    if choice == CUDNN:
        out, *rest = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        return out, ("cudnn", rest)
    if choice == FLASH:
        out, *rest = aten._scaled_dot_product_flash_attention(q, k, v)
        return out, ("flash", rest)
    out, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, ("efficient", rest)


def _attend_back(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, how: Any) -> tuple[Tensor, ...]:
    """The gradients of q, k and v."""
    # a token's heads behind each other, and in one piece: cuDNN finds its plan again by the strides of q, k and v alone
    gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    name, rest = how
    found: tuple[Tensor, ...]
    if name == "repeatable":
        delta = (gradient.float() * out.float()).sum(-1)
        found = attention_gradient(gradient, q, k, v, rest, delta)
    elif name == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, out, rest, 0.0, False)
    elif name == "efficient":
        back = aten._scaled_dot_product_efficient_attention_backward
        found = back(gradient, q, k, v, None, out, *rest, 0.0, [True, True, True, False])[:3]
    else:
        logs, of_q, of_k, most_q, most_k, seed, offset, _ = rest
        lengths = of_q, of_k, most_q, most_k, 0.0, False
        if name == "cudnn":
            back = aten._scaled_dot_product_cudnn_attention_backward
            found = back(gradient, q, k, v, out, logs, seed, offset, None, *lengths)
        else:
            back = aten._scaled_dot_product_flash_attention_backward
            found = back(gradient, q, k, v, out, logs, *lengths, seed, offset)
    return found
