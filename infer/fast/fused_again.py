"""A block of fused operators, of which nothing but its inputs and its attention is kept for the backward pass."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from infer.fast import fused_blocks
from infer.fast.fused_blocks import Block
from infer.fast.kept_attention import Kept

KEEPS = ("nothing", "attention", "everything")


def fused(keep: str, function: object, block: Block, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """In the place of infer/fast/recompute.py's `again`: the streams of a block by fused operators, whatever function
    computes them elsewhere. tensors: streams, modulations, cos and sin."""
    if not torch.is_grad_enabled():
        out = fused_blocks.compute(block, tensors, again=False, once=True)
    elif keep == "everything":
        out = fused_blocks.compute(block, tensors, again=False)
    else:
        leaves, spec = tree_flatten((block, tensors))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        out = _Again.apply(keep, leaves, spec, places, *(leaves[i] for i in places))
    return out if len(out) > 1 else out[0]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keep: str, leaves: list[Any], spec: Any, places: list[int], *learned: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.kept = Kept() if keep == "attention" else None
        ctx.leaves, ctx.spec, ctx.places = leaves, spec, places
        ctx.save_for_backward(*learned)
        block, tensors = tree_unflatten(leaves, spec)
        with nullcontext() if ctx.kept is None else ctx.kept.active(again=False):
            return fused_blocks.compute(block, tensors, again=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        learned = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        leaves = list(ctx.leaves)
        for place, x in zip(ctx.places, learned, strict=True):
            leaves[place] = x
        block, tensors = tree_unflatten(leaves, ctx.spec)
        with torch.enable_grad(), nullcontext() if ctx.kept is None else ctx.kept.active(again=True):
            out = fused_blocks.compute(block, tensors, again=True)
            found = torch.autograd.grad(out, learned, gradients, allow_unused=True)
        return None, None, None, None, *found
