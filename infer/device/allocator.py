"""torch's CUDA allocator: how it takes memory from the device, and the peak of what was allocated.

A captured graph has its working memory once, when it is captured. Replays use it again without asking, so that torch's
own peak since a reset leaves it out; here each replay is counted with what it works with.
"""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# peaks since the last reset that torch's own counters do not know, by device
_allocated: dict[int, int] = {}
_reserved: dict[int, int] = {}


def prepare() -> None:
    """Let the allocator's segments grow; call before CUDA is first used. A user's own setting stays.

    FLUX.1-dev's training step at 1024x1024 then holds 0.3 GiB beyond what is allocated, else 1.2 (H100, torch 2.11).
    Not under WSL 2, where such segments fail at the first allocation on some cards (pytorch/pytorch#192330).
    """
    given = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not given:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def reset_peak(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device)
    _allocated.pop(_number(device), None)
    _reserved.pop(_number(device), None)


def peak(device: torch.device) -> int:
    """The most bytes that were allocated at once since the last reset."""
    return max(torch.cuda.max_memory_allocated(device), _allocated.get(_number(device), 0))


def peak_reserved(device: torch.device) -> int:
    """The most bytes that the allocator held at once since the last reset: what other programs cannot have."""
    return max(torch.cuda.max_memory_reserved(device), _reserved.get(_number(device), 0))


def count_replay(device: torch.device, work: int) -> None:
    """Count a replay that needs `work` bytes beyond what it leaves allocated.

    What graphs of other shapes left within that memory, an adapter's gradients each, is counted twice.
    """
    number = _number(device)
    _allocated[number] = max(_allocated.get(number, 0), torch.cuda.memory_allocated(device) + work)


@contextmanager
def watched(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that gets, at the end of the with-block, its peak in bytes beyond what it left allocated."""
    number = _number(device)
    _allocated[number], _reserved[number] = peak(device), peak_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    found: list[int] = []
    yield found
    found.append(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))
