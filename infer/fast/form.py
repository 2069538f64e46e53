"""What `infer/fast/install.py` asks of a family: how its blocks of each list are read and computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from infer.fast.group import Group


class Form(NamedTuple):
    """How the blocks of one of a transformer's lists are read and computed."""

    blocks: str
    """The name of the list in diffusers' transformer; it calls the lists in the family's order of forms."""
    read: Callable[[Any, bool], tuple[list[Group], Callable[[int], Any]]]
    """(block, apart) -> its layers, and a function that gives the block's parts, adapters included, for a number of
    heads. apart: the weights of the largest product are to be dequantized in pieces."""
    arguments: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    """diffusers' arguments of a block -> the streams that it changes, and what else it reads."""
    compute: Callable[..., tuple[Tensor, ...]]
    """(again, parts, *streams, *rest) -> the streams; what `again(function, *arguments)` computes is computed again in
    the backward pass."""
