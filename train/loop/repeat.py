"""Training that comes to the same bits every time on one kind of GPU (`deterministic=true`).

What differed between two runs at full size was one kernel, the attention's backward pass, which adds in any order; the
fast path then takes infer/fast/attention.py's. The rest is said to the libraries: torch's own kernels and the plain
path's attention are those that repeat themselves, and compiled sums are divided by rule instead of by what was quickest
when a process tried.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeating(on: bool) -> Iterator[None]:
    """Within, torch takes kernels that repeat themselves, and raises where it has none."""
    if not on:
        yield
        return
    from torch._inductor import config as inductor

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; cuBLAS reads it when it starts
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, by_rule = memory.fill_uninitialized_memory, getattr(inductor, "deterministic", None)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    if by_rule is not None:  # torch 2.9 and newer
        inductor.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if by_rule is not None:
            inductor.deterministic = by_rule
