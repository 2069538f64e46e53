"""Training that gives the same bits every time on one kind of GPU (`deterministic=true`).

Between two runs at full size one kernel differed, the attention's backward pass, which sums in any order. The fast path
then uses the kernel of infer/fast/attention.py. Settings of the libraries do the rest: torch and the plain path's
attention use deterministic kernels, and compiled sums are split by a fixed rule, not by what a process measured as
fastest.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeating(on: bool) -> Iterator[None]:
    """In the with-block, if `on`, torch uses deterministic kernels, and raises where it has none."""
    if not on:
        yield
        return
    from torch._inductor import config as inductor

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it; cuBLAS reads it when it starts
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, by_rule = memory.fill_uninitialized_memory, getattr(inductor, "deterministic", None)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # this code reads no memory that it has not written
    if by_rule is not None:  # torch 2.9 and newer
        inductor.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if by_rule is not None:
            inductor.deterministic = by_rule
