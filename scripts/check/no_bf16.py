"""A card or a CPU that is taken for one without bf16, and the proof that nothing there is computed in bf16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer.fast import install as fast
from infer.quantize import compute


class NoBf16(TorchDispatchMode):
    """Refuses every operation that reads or gives a bf16 tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, found)):
            assert not isinstance(value, Tensor) or value.dtype != torch.bfloat16, f"{function} has a bf16 tensor"
        return found


@contextmanager
def forbidden() -> Iterator[list[int]]:
    """Within, the card or the CPU is taken for a card without bf16, and no compiled graph may hold a bf16 tensor; gives
    the number of values that were looked at."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    seen = [0]

    def inner(graph: Any, *args: Any, **kwargs: Any) -> Any:
        for node in graph.graph.nodes:
            for value in tree_leaves(node.meta.get("val")):
                seen[0] += 1
                assert getattr(value, "dtype", None) != torch.bfloat16, f"{node} is compiled in bf16"
        return compile_fx_inner(graph, *args, **kwargs)

    def lacking(asked: torch.dtype, device: torch.device) -> torch.dtype:
        if device.type == "cpu":
            return torch.float16 if asked == torch.bfloat16 else asked
        return dtype_of(asked, device)

    own = compute._bf16_on_card, compute.compute_dtype, fast.BACKEND
    dtype_of = compute.compute_dtype
    compute._bf16_on_card, compute.compute_dtype = lambda device: False, lacking  # type: ignore[assignment]
    fast.BACKEND = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[assignment]
    try:
        yield seen
    finally:
        compute._bf16_on_card, compute.compute_dtype, fast.BACKEND = own
