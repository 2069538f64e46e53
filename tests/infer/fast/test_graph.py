"""When a call is an ordinary one, when it is captured, and when what was captured is given back; no GPU is needed."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from infer.device import allocator
from infer.fast.cuda_graph import Replay


class Graph:
    """A captured call: running it again is the recorder's affair."""

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1

    def pool(self) -> str:
        return "pool"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order; CUDA played by hand."""
    done: list[str] = []

    @contextmanager
    def capturing(graph: Graph, **_: Any) -> Any:
        done.append("capture")
        yield

    @contextmanager
    def watched(_: torch.device) -> Any:
        work: list[int] = []
        yield work
        work.append(70)

    for name, value in {
        "CUDAGraph": Graph,
        "graph": capturing,
        "synchronize": lambda: None,
        "empty_cache": lambda: done.append("empty"),
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(allocator, "watched", watched)
    monkeypatch.setattr(allocator, "count_replay", lambda device, work: done.append(f"replay {work}"))
    return done


def doubled(done: list[str]) -> Any:
    def function(x: Tensor | None) -> Tensor:
        assert x is not None
        done.append("call")
        return 2 * x

    return function


def test_the_second_call_of_a_form_captures_and_a_released_one_is_captured_at_once(log: list[str]) -> None:
    replay, x, y = Replay(doubled(log)), torch.ones(2), torch.ones(3)
    for _ in range(3):
        assert torch.equal(replay(x), 2 * x)
    assert log == ["call", "empty", "capture", "call", "replay 70", "replay 70"]
    log.clear()
    replay(y)
    assert log == ["call"] and len(replay.captured) == 1
    log.clear()
    replay.release()
    assert log == ["empty"] and not replay.captured
    replay(x)
    assert log[1:] == ["empty", "capture", "call", "replay 70"]
    replay.clear()
    log.clear()
    replay(x)
    assert log == ["call"]


def test_under_a_budget_graphs_are_given_back_before_an_ordinary_call(log: list[str]) -> None:
    offload: Any = SimpleNamespace(graphs=[], rewind=lambda: None, join=lambda: None)
    replay = Replay(doubled(log), offload)
    for x in (torch.ones(2), torch.ones(2), torch.ones(3)):
        replay(x)
    assert not replay.captured and len(replay.seen) == 2
    assert offload.graphs == [replay.release]  # blocks that move take the graphs with them


def test_an_ordinary_call_that_runs_out_of_memory_has_that_of_graphs(log: list[str]) -> None:
    short = False

    def function(x: Tensor | None) -> Tensor:
        assert x is not None
        if short and "empty" not in log:
            log.append("out of memory")
            raise torch.OutOfMemoryError
        return 2 * x

    replay = Replay(function)
    for _ in range(2):
        replay(torch.ones(2))
    short = True
    log.clear()
    assert torch.equal(replay(torch.ones(3)), torch.full((3,), 2.0))
    assert log == ["out of memory", "empty"] and not replay.captured
    log.clear()
    with pytest.raises(torch.OutOfMemoryError):  # nothing is captured that could be given back
        replay(torch.ones(4))
