"""The device of a command: picked by its name, described in reports, and freed of what is no longer used."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_device_name(name: str) -> None:
    """
    Raises:
        ValueError: it names no kind of device that is used here.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device is {name!r}; choose auto, cuda or cpu")


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda`, `cuda:1` or `cpu` -> device.

    Raises:
        ValueError: there is no such device here.
    """
    check_device_name(name)
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch sees no CUDA device here; set device=cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but torch sees {torch.cuda.device_count()} CUDA devices; count from cuda:0")
    return device


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":")[1] for line in lines if line.startswith("model name")]
    return f"cpu: {names[0].strip() if names else platform.processor() or platform.machine()}"


def release(device: torch.device) -> None:
    """Give freed memory back to the device or the system, so that the next part's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    else:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
