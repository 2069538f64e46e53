"""A driver that moves memory to the host is noticed by the clock, on a full card alone, and said once."""

from types import SimpleNamespace

import pytest
import torch

from train.loop.spill import Spill

CUDA = torch.device("cuda")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The card's memory in use, of 1000."""
    use = {"bytes": 950}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: use["bytes"])
    return use


def told(spill: Spill, seconds: list[float]) -> list[str]:
    return [text for each in seconds if (text := spill.note(each)) is not None]


def test_slow_steps_on_a_full_card_are_said_once(held: dict[str, int]) -> None:
    said = told(Spill(CUDA), [60.0, *[0.4] * 25, *[3.0] * 10])
    assert len(said) == 1 and "steps take 3.00 s where they took 0.40, with 95 % of the card" in said[0]


def test_what_is_no_spill_is_not_said(held: dict[str, int]) -> None:
    steady = [0.4] * 25
    assert not told(Spill(CUDA), [*steady, 3.0, 3.0, *steady])  # a preview, another size
    assert not told(Spill(CUDA), [*steady, *[1.5] * 10])  # not so much slower
    assert not told(Spill(torch.device("cpu")), [*steady, *[3.0] * 10])
    held["bytes"] = 500
    assert not told(Spill(CUDA), [*steady, *[3.0] * 10])
