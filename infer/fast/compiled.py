"""Blocks as compiled functions, few for all that a process does.

Compiled code is for one form of block, one form of adapters, and what is kept for the backward pass; sizes and batches
are free. Validation and previews of a model in training run the code of its training steps, forward alone.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from infer.fast.form import Form
from infer.fast.group import Group
from infer.fast.recompute import again


@cache  # for all transformers of a process: what one of them compiled, the next one finds
def run_of(form: Form, keep: str, backend: str | None) -> Callable[..., tuple[Tensor, ...]]:
    """A form's blocks as one function; backend: of torch.compile, or None for no compilation."""
    function = partial(form.compute, partial(again, keep))
    if backend is None:
        return function
    compiled: Any = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    return compiled  # type: ignore[no-any-return]


def call_compiled(
    run: Callable[..., tuple[Tensor, ...]],
    groups: list[Group],
    block: Any,
    streams: tuple[Tensor, ...],
    rest: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """A block's streams by compiled code, which is one for validation and training, and one for all sizes."""
    alone = not torch.is_grad_enabled() and any(group.learns() for group in groups)
    if alone:  # what is kept for a gradient is free again once the block is done
        streams = tuple(x.detach().requires_grad_() for x in streams)
    for x in (streams[-1], *rest):
        _any_size(x)
    with torch.set_grad_enabled(alone or torch.is_grad_enabled()):
        streams = run(block, *streams, *rest)
    return tuple(x.detach() for x in streams) if alone else streams


def _any_size(x: Tensor) -> None:
    """Have code compiled for a tensor [batch, tokens, width], [batch, width] or [tokens, width] hold for other ones."""
    for dimension in range(x.ndim - 1):
        if x.shape[dimension] > 1:  # of one, sums and broadcasts differ
            torch._dynamo.maybe_mark_dynamic(x, dimension)
