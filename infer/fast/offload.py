"""Blocks whose stored weights stay in host memory and are copied to the device when their turn comes.

A few slots on the device hold the blocks that are needed next. While one block computes, the next ones are copied
from pinned memory on a CUDA stream of their own; a slot is filled again once its block is done. The backward pass goes
through the same slots in the other order.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infer.device import allocator
from infer.fast.buffer import buffer_bytes, copy_into, use_buffer, views_of
from infer.fast.memory import SLOTS, device_bytes, offloaded_blocks, residents
from infer.fast.weights import Stack


def _moved(frozen: Stack, device: torch.device) -> Stack:
    """What stays on the device of an offloaded block: biases, code books and offsets."""
    bias = None if frozen.bias is None else frozen.bias.to(device)
    frozen = frozen._replace(bias=bias)
    if frozen.nested is None:
        return frozen
    outer, code, offsets = frozen.nested
    return frozen._replace(nested=(outer, code.to(device), offsets.to(device)))


def _pin(offload: "Offload") -> None:
    """Lock the blocks in host memory for as long as the offload lives, so that the GPU copies from them by itself.

    torch's own pinned tensors are rounded up to a power of two: 9.7 GiB for the 6.2 of FLUX.1-dev's NF4 blocks.

    Raises:
        ValueError: the system does not lock so much.
    """
    cuda: Any = torch.cuda.cudart()
    code = cuda.cudaHostRegister(offload.pinned.data_ptr(), offload.pinned.numel(), 0)
    if code != cuda.cudaError.success:
        raise ValueError(
            f"memory.budget_gib keeps {offload.host_bytes / 2**30:.1f} GiB in pinned host memory, and the system did "
            f"not lock it ({cuda.cudaGetErrorString(code)}); free host memory, raise its limit (ulimit -l), or set "
            "memory.budget_gib=null"
        )
    weakref.finalize(offload, cuda.cudaHostUnregister, offload.pinned.data_ptr()).atexit = False


class Offload:
    """A transformer's blocks in host memory, and which of them lies in which slot on the device."""

    def __init__(self, blocks: list[list[Any]], device: torch.device) -> None:
        """blocks: each block's groups (infer/fast/install.py), in their order; they may lie on the host."""
        self.blocks, self.device = blocks, device
        self.graphs: list[Callable[[], None]] = []  # each releases captured graphs, which read the slots
        stacks = [[group.frozen for group in groups] for groups in blocks]
        self.pinned = torch.empty(sum(map(buffer_bytes, stacks)), dtype=torch.uint8)
        self.host = list(self.pinned.split([buffer_bytes(each) for each in stacks]))
        del stacks
        for groups, buffer in zip(blocks, self.host, strict=True):
            copy_into(buffer, [group.frozen for group in groups])
            for group in groups:
                group.use(_moved(group.frozen, device))
            use_buffer(groups, buffer)  # what they lay in before is free
        cuda = device.type == "cuda"
        if cuda:
            _pin(self)
        self.copy_stream = torch.cuda.Stream(device) if cuda else None
        self.copying = False  # since the last join
        self.set_resident(0)

    def set_resident(self, resident: int) -> None:
        """Have so many blocks stay on the device."""
        count = len(self.blocks) - resident
        assert 0 <= count <= len(self.blocks), f"there are {len(self.blocks)} blocks, not {resident}"
        self.release()
        if self.copy_stream is not None:
            torch.cuda.synchronize(self.device)  # a slot's memory is given back while nothing is copied there
        for groups, buffer in zip(self.blocks, self.host, strict=True):
            use_buffer(groups, buffer)  # what they have on the device is freed first
        self.offloaded = offloaded_blocks(len(self.blocks), resident)
        self.number = {block: number for number, block in enumerate(self.offloaded)}
        self.slots: list[Tensor] = []
        largest = max((self.host[i].numel() for i in self.offloaded), default=0)
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(min(SLOTS, count))]
        self.arriving: list[torch.cuda.Event | None] = [None] * len(self.slots)
        self.holds: list[int | None] = [None] * len(self.slots)
        for i, groups in enumerate(self.blocks):
            offloaded = i in self.number
            buffer = self.slots[self.number[i] % len(self.slots)] if offloaded else self.host[i].to(self.device)
            use_buffer(groups, buffer)

    def release(self) -> None:
        """Have captured graphs give back their memory: what they do not do themselves takes its own within a budget."""
        for release in self.graphs:
            release()

    @property
    def host_bytes(self) -> int:
        """Pinned memory: every block lies on the host, resident ones too."""
        return self.pinned.numel()

    def _fetch(self, number: int) -> None:
        """Copy a block into its slot, once all that was queued so far is done with the slot."""
        slot = number % len(self.slots)
        if self.holds[slot] == number:
            return
        self.holds[slot] = number
        target = self.slots[slot].data  # a version counter of its own: autograd keeps views of the slot
        buffer = self.host[self.offloaded[number]]
        if self.copy_stream is None:
            target[: buffer.numel()].copy_(buffer)
            return
        self.copying = True
        self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copy_stream):
            target[: buffer.numel()].copy_(buffer, non_blocking=True)
            self.arriving[slot] = self.copy_stream.record_event()

    def at_device(self, block: int, group: Any) -> Stack:
        """The weights of one of a block's groups on the device; those of an offloaded block as a copy, in no slot."""
        if block not in self.number:
            return group.frozen  # type: ignore[no-any-return]
        groups = self.blocks[block]
        held = views_of(self.host[block], [each.frozen for each in groups])[groups.index(group)]
        scale, nested = held.scale, held.nested
        if scale is not None:
            scale = scale.to(self.device, non_blocking=True)
        if nested is not None:
            nested = nested[0].to(self.device, non_blocking=True), *nested[1:]
        return held._replace(stored=held.stored.to(self.device, non_blocking=True), scale=scale, nested=nested)

    def need(self, block: int) -> None:
        """Wait until a block's weights are on the device."""
        if block not in self.number:
            return
        number = self.number[block]
        self._fetch(number)
        slot = number % len(self.slots)
        event, self.arriving[slot] = self.arriving[slot], None
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def rewind(self) -> None:
        """Have the first blocks in the slots, as a training step finds and leaves them: a captured one relies on it."""
        for number in range(len(self.slots)):
            self.need(self.offloaded[number])
        self.join()

    def join(self) -> None:
        """Wait for what is still being copied.

        A call that copies nothing, as where all blocks stay on the device or each offloaded one has its slot, has
        nothing to wait for: while it is captured, waiting for what came before it is an error.
        """
        if self.copy_stream is not None and self.copying:
            torch.cuda.current_stream(self.device).wait_stream(self.copy_stream)
            self.arriving = [None] * len(self.slots)
        self.copying = False

    def fit(self, budget_gib: float, work: Callable[[], object]) -> int:
        """Have as many blocks stay on the device as a budget allows beside `work`, which is run to see what it takes;
        returns their number.

        Raises:
            ValueError: the work does not fit with every block in host memory.
        """
        budget, sizes = int(budget_gib * 2**30), [buffer.numel() for buffer in self.host]
        self.set_resident(0)
        taken = self._taken(work)
        if taken > budget:
            raise ValueError(
                f"memory.budget_gib is {budget_gib}, but with every block in host memory the work itself takes "
                f"{taken / 2**30:.2f} GiB; raise the budget, or choose memory=lean, a smaller resolution or batch_size"
            )
        resident = residents(sizes, budget - taken + device_bytes(sizes, 0))
        while resident > 0:
            self.set_resident(resident)
            excess = self._taken(work) - budget
            if excess <= 0:
                break
            # the allocator's holes are not the same for every number of blocks
            resident = max(resident - max(1, round(excess / max(sizes))), 0)
            if resident == 0:
                self.set_resident(0)
        return resident

    def _taken(self, work: Callable[[], object]) -> int:
        """Bytes that torch holds on the device for the work, compiled, captured and repeated."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        allocator.reset_peak(self.device)
        for _ in range(3):
            work()
        torch.cuda.synchronize(self.device)
        return allocator.peak_reserved(self.device)

    def done(self, block: int, backwards: bool) -> None:
        """A block is computed: fetch the one that takes its slot next."""
        if block not in self.number:
            return
        count, ahead = len(self.offloaded), len(self.slots)
        following = self.number[block] + (-ahead if backwards else ahead)
        if 0 <= following < count:
            self._fetch(following)
        elif not backwards and not torch.is_grad_enabled():
            self._fetch(self.number[block] % ahead)  # sampling begins again with the first blocks

    def before(self, block: int, *streams: Tensor) -> tuple[Tensor, ...]:
        self.need(block)
        if not torch.is_grad_enabled():
            return streams
        left: tuple[Tensor, ...] = _Leave.apply(self, block, *streams)
        return left

    def after(self, block: int, *streams: Tensor) -> tuple[Tensor, ...]:
        self.done(block, backwards=False)
        if not torch.is_grad_enabled():
            return streams
        entered: tuple[Tensor, ...] = _Enter.apply(self, block, *streams)
        return entered


class _Enter(torch.autograd.Function):
    """The identity at a block's end: its backward pass is about to begin."""

    @staticmethod
    def forward(ctx: Any, offload: Offload, block: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.offload, ctx.block = offload, block
        return tuple(x.view_as(x) for x in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.offload.need(ctx.block)
        return None, None, *gradients


class _Leave(torch.autograd.Function):
    """The identity at a block's start: its backward pass is done."""

    @staticmethod
    def forward(ctx: Any, offload: Offload, block: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.offload, ctx.block = offload, block
        return tuple(x.view_as(x) for x in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.offload.done(ctx.block, backwards=True)
        return None, None, *gradients
