"""How time is traded for memory: the settings of the fast path (infer/fast/install.py), checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from infer.program.bounds import GIB, MANY, check_most

KEEP = ("nothing", "attention", "products", "everything")
AUTO = "auto"
# settings, and the value of each that asks for nothing
NEEDS_FUSED = {"compile": "null", "graph": "null", "budget_gib": "null", "keep_all": "0", "unpacked": "false"}
SLOTS = 3  # buffers on the device that offloaded blocks take in turn


@dataclass
class Memory:
    """How time is traded for memory: what a block keeps for its backward pass, and where its weights are."""

    keep: str = "attention"
    """What a block keeps for its backward pass: nothing (all is computed again from its input), attention (all but the
    attention is), products (all but the matrix products is) or everything. auto, in training alone: attention, and
    everything in as many blocks as the card has memory for (train/estimate/auto.py)."""
    keep_all: int = 0
    """How many blocks, the last ones, keep everything whatever `keep` says of the others: time for memory in small
    steps."""
    unpacked: bool = False
    """Keep a copy of the blocks' quantized weights as they take part in products: no time for dequantizing them; 16 GiB
    for FLUX.1-dev."""
    fused: bool = True
    """The toolkit's own form of FLUX's blocks; false: diffusers' and PEFT's (`keep` then nothing or everything)."""
    compile: bool | None = None
    """torch.compile the blocks (true) or not (false); null: on CUDA the toolkit's own kernels, which are
    compiled at once, and torch.compile where they do not reach: products in fp16, keep=products."""
    graph: bool | None = None
    """Capture a step as a CUDA graph and replay it, once for each shape; null does so on CUDA."""
    budget_gib: float | None = None
    """What torch's allocator may hold on the device in training or denoising: blocks beyond it stay in host memory and
    are copied when their turn comes. null keeps all on the device."""

    def __post_init__(self) -> None:
        check_most(self, "memory.", budget_gib=GIB, keep_all=MANY)
        if self.keep not in (*KEEP, AUTO):
            raise ValueError(f"memory.keep is {self.keep!r}; choose one of {', '.join((*KEEP, AUTO))}")
        if self.keep_all < 0:
            raise ValueError(f"memory.keep_all is {self.keep_all}; it must be 0 or more")
        if self.keep_all and self.keep in ("everything", AUTO):
            raise ValueError(
                f"memory.keep_all={self.keep_all} has no effect, as memory.keep={self.keep} is for all blocks; set "
                "memory.keep_all=0, or memory.keep=attention"
            )
        if not self.fused:
            if self.keep not in ("nothing", "everything", AUTO):
                raise ValueError(
                    f"memory.keep is {self.keep}, which needs memory.fused=true; choose nothing or everything"
                )
            asked = [name for name in NEEDS_FUSED if getattr(self, name)]
            if asked:
                raise ValueError(f"memory.{asked[0]}={getattr(self, asked[0])} needs memory.fused=true")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"memory.budget_gib is {self.budget_gib}; it must be above 0, or null for no bound")

        if self.unpacked and self.budget_gib is not None:
            raise ValueError(
                f"memory.unpacked=true keeps copies of weights on the device, and memory.budget_gib={self.budget_gib} "
                "has weights leave it; set one of them to false, or null"
            )

    def without_auto(self) -> Memory:
        """The settings with what memory=auto is where there is nothing to gain."""
        return replace(self, keep="attention" if self.fused else "nothing") if self.keep == AUTO else self

    def compiles(self, device: torch.device) -> bool:
        """Whether blocks may be compiled."""
        return device.type == "cuda" if self.compile is None else self.compile

    def kernels(self, device: torch.device) -> bool:
        """Whether blocks are computed by the toolkit's own kernels (infer/fast/fused_blocks.py), where these reach."""
        return self.fused and self.compile is None and device.type == "cuda" and self.keep != "products"

    def graphs(self, device: torch.device) -> bool:
        """Whether sampling is captured."""
        return self.fused and device.type == "cuda" and self.graph is not False


def refuse_plain(memory: Memory, device: torch.device, reason: str | None, products: str = "bf16") -> Memory:
    """The settings as they are, or, where there is a `reason` against the fast path, those of the plain one.

    products: precision.products, of which the plain path knows bf16 alone.

    Raises:
        ValueError: a setting needs the fast path, or a GPU.
    """
    if memory.budget_gib is not None and device.type != "cuda":
        raise ValueError(f"memory.budget_gib bounds a GPU's memory, but the device is {device}; set it to null")
    return memory if reason is None else plain_memory(memory, reason, products)


def plain_memory(memory: Memory, reason: str, products: str = "bf16") -> Memory:
    """The settings of the plain path in place of some of the fast one, which a `reason` rules out.

    Raises:
        ValueError: a setting needs the fast path.
    """
    if products != "bf16":
        raise ValueError(
            f"precision.products={products} needs the fast path, but {reason}; set precision.products=bf16"
        )
    for name, none in NEEDS_FUSED.items():
        if getattr(memory, name):
            raise ValueError(
                f"memory.{name}={getattr(memory, name)} needs the fast path, but {reason}; set memory.{name}={none}"
            )
    return Memory(keep="everything" if memory.keep == "everything" else "nothing", fused=False)


def offloaded_blocks(blocks: int, resident: int) -> list[int]:
    """Which blocks are offloaded where so many stay: evenly spread, so that the copies have their time too."""
    return [i * blocks // (blocks - resident) for i in range(blocks - resident)]


def residents(sizes: list[int], room: int) -> int:
    """How many blocks of these sizes may stay on the device where they and the slots may have so many bytes."""
    return max((count for count in range(len(sizes) + 1) if device_bytes(sizes, count) <= room), default=0)


def device_bytes(sizes: list[int], resident: int) -> int:
    """Of the blocks that stay on the device and of the slots that the others take turns in."""
    offloaded = [sizes[i] for i in offloaded_blocks(len(sizes), resident)]
    return sum(resident_bytes(sizes, resident)) + min(SLOTS, len(offloaded)) * max(offloaded, default=0)


def resident_bytes(sizes: list[int], resident: int) -> list[int]:
    """Of the blocks that stay on the device."""
    offloaded = set(offloaded_blocks(len(sizes), resident))
    return [size for i, size in enumerate(sizes) if i not in offloaded]
