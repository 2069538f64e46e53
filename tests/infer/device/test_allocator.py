"""Peaks that torch's own counters do not know: of captured work, and of what came before a reset."""

import os

import pytest
import torch

from infer.device import allocator

CUDA = torch.device("cuda", 0)


class Counters:
    """torch's counters, played by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.top = self.held = self.most = 0
        for name, value in {
            "memory_allocated": lambda _: self.now,
            "max_memory_allocated": lambda _: self.top,
            "max_memory_reserved": lambda _: self.most,
            "reset_peak_memory_stats": lambda _: self.reset(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def reset(self) -> None:
        self.top, self.most = self.now, self.held

    def take(self, allocated: int, held: int) -> None:
        self.now, self.held = allocated, held
        self.top, self.most = max(self.top, allocated), max(self.most, held)


def test_a_replay_counts_with_what_it_works_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counters(monkeypatch)
    seen.take(100, 150)
    allocator.reset_peak(CUDA)
    seen.take(160, 200)  # an ordinary call
    seen.take(100, 120)
    with allocator.watched(CUDA) as work:  # the capture: 70 at the peak, of which 10 stay
        seen.take(170, 180)
        seen.take(110, 180)
    assert work == [60]
    assert (allocator.peak(CUDA), allocator.peak_reserved(CUDA)) == (170, 200)
    allocator.reset_peak(CUDA)
    assert (allocator.peak(CUDA), allocator.peak_reserved(CUDA)) == (110, 180)
    allocator.count_replay(CUDA, work[0])
    assert allocator.peak(CUDA) == 170
    seen.take(130, 180)  # an optimizer's states came
    allocator.count_replay(CUDA, work[0])
    assert allocator.peak(CUDA) == 190
    allocator.reset_peak(CUDA)
    assert allocator.peak(CUDA) == 130


@pytest.mark.parametrize(
    ("system", "release", "expected"),
    [
        ("linux", "6.8.0-52-generic", "expandable_segments:True"),
        ("linux", "6.6.87.2-microsoft-standard-WSL2", None),
        ("win32", "11", None),
    ],
)
def test_segments_grow_where_the_system_can(
    system: str, release: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.release", lambda: release)
    allocator.prepare()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_own_setting_of_the_allocator_stays(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0")
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    allocator.prepare()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        None: "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
        "PYTORCH_CUDA_ALLOC_CONF": None,
    }.get(own)
