"""What a block's backward pass finds, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
ATTENTION = [
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.flux_lora.attention.default,  # infer/fast/attention.py, which infer/fast/blocks.py imports
]
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    torch.ops.flux_lora.multiply_int8.default,  # infer/fast/int8_kernels.py
]


def _policy(keep: str, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if (keep != "nothing" and op in ATTENTION) or (keep == "products" and op in PRODUCTS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# named functions: torch's cache of compiled code knows them by their names, so another policy is another name
def _keep_nothing() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, "nothing"))


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, "attention"))


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, "products"))


CONTEXTS: dict[str, Any] = {"nothing": _keep_nothing, "attention": _keep_attention, "products": _keep_products}
for _context in CONTEXTS.values():
    _context.cache_hash = f"flux_lora {_context.__name__}"  # as torch 2.13 asks


def again(keep: str, function: Callable[..., Any], *args: Any) -> Any:
    """The function's value; in a backward pass it is computed again, but for what is kept."""
    if keep == "everything" or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=CONTEXTS[keep])
