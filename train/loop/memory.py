"""The peak memory of the training itself."""

import resource
import sys

import torch

from infer.device import allocator


def start_memory(device: torch.device) -> None:
    """Reset the peak of a GPU's memory, so that it does not count what was loaded or drawn before."""
    if device.type == "cuda":
        allocator.reset_peak(device)


def memory_bytes(device: torch.device) -> int:
    """The peak so far: of torch's allocator on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return allocator.peak(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
