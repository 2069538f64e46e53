"""Seconds and peak memory of one piece of work."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from infer.device import allocator


@dataclass
class Measure:
    """Filled in when the work is over."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """CUDA: the most allocated by torch. CPU: the largest resident set of this process."""
    peak_reserved_bytes: int | None = None
    """CUDA: the most held by torch's allocator, which is what other programs cannot have. CPU: None."""


@contextmanager
def measure(device: torch.device) -> Iterator[Measure]:
    """Time a with-block, the device's queue emptied before and after, and watch its memory.

    The resident set is sampled every 5 ms: a shorter spike can be missed.
    """
    result = Measure()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocator.reset_peak(device)
        start = time.perf_counter()
        yield result
        torch.cuda.synchronize(device)
        result.seconds = time.perf_counter() - start
        result.peak_memory_bytes = allocator.peak(device)
        result.peak_reserved_bytes = allocator.peak_reserved(device)
        return
    process, over = psutil.Process(os.getpid()), threading.Event()

    def watch() -> None:
        while not over.is_set():
            result.peak_memory_bytes = max(result.peak_memory_bytes, process.memory_info().rss)
            over.wait(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - start
        over.set()
        watcher.join()
    result.peak_memory_bytes = max(result.peak_memory_bytes, process.memory_info().rss)
