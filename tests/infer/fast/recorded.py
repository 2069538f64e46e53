"""A CUDA graph on a CPU: the operations of a call are recorded, and run again on the tensors that they had.

That is what a captured graph does: it reads its inputs where they lay, computes again, and leaves its results where the
first ones lay. What a caller forgets to copy into those places, or keeps of a result for too long, shows in the values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, first in self.operations:
                found = function(*args, **kwargs)
                for old, new in zip(tree_leaves(first), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor) and not new.is_set_to(old):
                        old.copy_(new)

    def pool(self) -> str:
        return "pool"


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, found))
        return found


@contextmanager
def capturing(graph: Graph, **_: Any) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    with Recorder(graph):
        yield
