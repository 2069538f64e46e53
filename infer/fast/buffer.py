"""The stored weights of a block's layers, one after another in one buffer of bytes.

A block is then copied as a whole (infer/fast/offload.py), and its layers' former memory is free in one piece; tensors
that are moved one by one leave holes that nothing else fits into.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from infer.fast.weights import Stack

ALIGN = 256  # bytes: what kernels may ask of a tensor's address


def _tensors(frozen: Stack) -> list[Tensor]:
    """What lies in the buffer: all but biases and code books, which are small."""
    parts = [frozen.stored, frozen.scale, frozen.nested[0] if frozen.nested else None]
    return [part for part in parts if part is not None]


def _with(frozen: Stack, tensors: list[Tensor]) -> Stack:
    stored, *rest = tensors
    frozen = frozen._replace(stored=stored)
    if rest:
        frozen = frozen._replace(scale=rest[0])
    if len(rest) > 1:
        assert frozen.nested is not None
        frozen = frozen._replace(nested=(rest[1], *frozen.nested[1:]))
    return frozen


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(tensor: Tensor) -> int:
    return -(-_bytes(tensor) // ALIGN) * ALIGN


def buffer_bytes(stacks: Iterable[Stack]) -> int:
    """Bytes of a buffer that holds them."""
    return sum(_padded(tensor) for frozen in stacks for tensor in _tensors(frozen))


def views_of(buffer: Tensor, stacks: Iterable[Stack]) -> list[Stack]:
    """The stacks with views of a buffer [bytes] in the place of their tensors."""
    found, start = [], 0
    for frozen in stacks:
        views = []
        for tensor in _tensors(frozen):
            views.append(buffer[start : start + _bytes(tensor)].view(tensor.dtype).view(tensor.shape))
            start += _padded(tensor)
        found.append(_with(frozen, views))
    return found


def copy_into(buffer: Tensor, stacks: list[Stack]) -> None:
    """Copy their tensors into a buffer [bytes]."""
    for frozen, copies in zip(stacks, views_of(buffer, stacks), strict=True):
        for tensor, view in zip(_tensors(frozen), _tensors(copies), strict=True):
            view.copy_(tensor)


def use_buffer(groups: list[Any], buffer: Tensor) -> None:
    """Have a block's groups (infer/fast/install.py) use the copies of their weights in a buffer."""
    for group, frozen in zip(groups, views_of(buffer, [group.frozen for group in groups]), strict=True):
        group.use(frozen)
