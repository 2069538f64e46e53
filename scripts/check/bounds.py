"""What holds within a row: where blocks lie, how long it may take, and which device accelerate takes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState

from infer.fast import offload as offloading


@contextmanager
def streamed(blocks: int | None) -> Iterator[None]:
    """Within, so many blocks are offloaded whatever a budget allows, of None half of them."""
    whole = offloading.residents

    def few(sizes: list[int], room: int) -> int:
        return len(sizes) - (len(sizes) // 2 if blocks is None else blocks)

    offloading.residents = few
    try:
        yield
    finally:
        offloading.residents = whole


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Within, a row that takes longer fails; 0: it may take what it takes."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"the row was not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within, accelerate takes a CPU, whatever it took before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
