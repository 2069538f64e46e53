"""Captured calls against ordinary ones: on a CPU operations are recorded and run again in place (recorded.py), on a GPU
by CUDA itself. When a call is captured, and when what was captured is given back."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from infer.adapter.switch import switch
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.device import allocator
from infer.fast.cuda_graph import Replay, Sampler
from infer.fast.install import install
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from tests.infer.fast.families import CPU, make, velocity
from tests.infer.fast.recorded import Graph, capturing
from tests.infer.fast.test_fast import ADAPTERS, error, exact


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order."""
    done: list[str] = []

    @contextmanager
    def captured(graph: Graph, **options: Any) -> Any:
        done.append("capture")
        with capturing(graph, **options):
            yield

    @contextmanager
    def watched(_: torch.device) -> Any:
        work: list[int] = []
        yield work
        work.append(70)

    for name, value in {
        "CUDAGraph": Graph,
        "graph": captured,
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
    for times in (1, 2, 3):
        assert torch.equal(replay(times * x), 2 * times * x)
    assert log == ["call", "empty", "capture", "call", "replay 70", "replay 70"]
    log.clear()
    replay(y)
    assert log == ["call"] and len(replay.captured) == 1
    log.clear()
    replay.release()
    assert log == ["empty"] and not replay.captured
    assert torch.equal(replay(5 * x), 10 * x)
    assert log[1:] == ["empty", "capture", "call", "replay 70"]
    replay.clear()
    log.clear()
    replay(x)
    assert log == ["call"]


def test_what_a_captured_call_gives_is_overwritten_by_the_next_of_its_form_alone(log: list[str]) -> None:
    def function(x: Tensor | None, *, scale: Tensor | None, other: Tensor | None) -> list[Tensor]:
        assert x is not None and scale is not None
        total = x.cumsum(0).mul_(scale)
        total[0] = 7
        return [total, total.flip(0) + (0 if other is None else other)]

    replay = Replay(function)
    for i in range(1, 5):
        x, scale, other = i * torch.arange(3.0), torch.tensor(float(i)), torch.full((3,), 10.0 * i)
        for more in (other, None):
            expected = function(x, scale=scale, other=more)
            found = replay(x, scale=scale, other=more)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            if i == 3 and more is not None:
                kept, was = found[0], expected[0]
        if i == 3:
            assert torch.equal(kept, was)  # a call of another form came after it
    assert not torch.equal(kept, was)  # a call of its own


def drawn(transformer: Any, seed: int, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return velocity(transformer, torch.Generator().manual_seed(seed), (1, 8, 8), dtype)


def test_a_captured_transformer_draws_what_an_ordinary_one_does(model: Model, log: list[str]) -> None:
    """Whatever goes in, with its adapter and without."""
    precision = exact("nf4")
    transformer, _ = make(precision, ADAPTERS["lora"], model)
    install(transformer, Memory(), CPU)
    expected: dict[bool, list[Tensor]] = {}
    for on in (True, False):
        switch(transformer, on)
        expected[on] = [drawn(transformer, seed, precision.dtype) for seed in range(3)]
    sampler = Sampler(transformer, None)
    for on in (True, False):
        switch(transformer, on)
        sampler.refresh()
        found = [drawn(transformer, seed, precision.dtype) for seed in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected[on], strict=True))
    assert log.count("capture") == 2 and log.count("replay 70") == 4
    assert error(expected[True], expected[False]) > 1e-3


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_captured_transformer_draws_what_an_ordinary_one_does(tiny: Model) -> None:
    device, precision = torch.device("cuda"), Precision("nf4")
    transformer = load_transformer(tiny, precision, device)
    install(transformer, Memory(compile=False), device)
    config, found = transformer.config, []
    for sampler in (None, Sampler(transformer, None)):
        if sampler is not None:
            sampler.refresh()
        noise = torch.Generator(device).manual_seed(0)
        for _ in range(4):  # an ordinary call, one that captures, and two that launch what was captured
            x, text = (
                torch.randn(1, tokens, width, device=device, generator=noise, dtype=precision.dtype)
                for tokens, width in ((16, config.in_channels), (20, config.joint_attention_dim))
            )
            pooled = torch.randn(1, config.pooled_projection_dim, device=device, generator=noise).to(precision.dtype)
            ids = torch.zeros(16, 3, device=device), torch.zeros(20, 3, device=device)
            ids[0][:, 1] = torch.arange(16, device=device)
            with torch.no_grad():
                (one,) = transformer(
                    hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled,
                    timestep=torch.rand(1, device=device, generator=noise), img_ids=ids[0], txt_ids=ids[1],
                    guidance=torch.ones(1, device=device), return_dict=False,
                )  # fmt: skip
            found.append(one)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], found[4:], strict=True))
    assert not torch.equal(found[0], found[1])
