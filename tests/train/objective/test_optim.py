"""Rates and updates against formulas written out by hand."""

import math
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from prodigyopt import Prodigy
from torch import nn

from train.objective.optim import Optim, make_optimizer, make_schedule, step_if


def expected(schedule: str, warmup: int, step: int, steps: int) -> float:
    """The share of the full rate at an update, counted from 0."""
    if step < warmup:
        return step / warmup
    gone = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[schedule]


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates(schedule: str, warmup: int) -> None:
    optim = Optim(lr=0.3, schedule=schedule, warmup=warmup)
    optimizer = make_optimizer(optim, [nn.Parameter(torch.ones(1))])
    scheduler = make_schedule(optim, optimizer, 12)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == rates[-1:]
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.3 * expected(schedule, warmup, step, 12) for step in range(13)], abs=1e-12)
    assert (rates[-1] == pytest.approx(0, abs=1e-12)) == (schedule != "constant")


def by_hand(x: float, gradients: list[float], lr: float, b1: float, b2: float, eps: float, decay: float) -> float:
    """AdamW (Loshchilov and Hutter 2019)."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        x -= lr * decay * x
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return x


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_adamw(name: str) -> None:
    optim = Optim(name=name, lr=0.05, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
    starts, gradients = [0.5, -2.0, 3.0], [[0.2, -1.0, 0.01], [-0.3, 0.4, 0.02], [0.1, 0.1, -0.5]]
    parameter = nn.Parameter(torch.tensor(starts))
    optimizer = make_optimizer(optim, [parameter])
    for row in gradients:
        parameter.grad = torch.tensor(row)
        optimizer.step()
    columns = zip(*gradients, strict=True)
    wanted = [by_hand(x, list(g), 0.05, 0.8, 0.95, 1e-3, 0.1) for x, g in zip(starts, columns, strict=True)]
    assert parameter.tolist() == pytest.approx(wanted, abs=1e-6)


def test_names_make_their_optimizers() -> None:
    kinds = {
        "adamw": torch.optim.AdamW,
        "adamw8bit": bnb.optim.AdamW8bit,
        "paged_adamw8bit": bnb.optim.PagedAdamW8bit,
        "prodigy": Prodigy,
    }
    for name, kind in kinds.items():
        optim = Optim(name=name, lr=0.2, beta1=0.7, beta2=0.9, eps=1e-5, weight_decay=0.3)
        optimizer = make_optimizer(optim, (nn.Parameter(torch.ones(3)) for _ in range(2)))
        assert type(optimizer) is kind
        (group,) = optimizer.param_groups
        assert len(group["params"]) == 2 and tuple(group["betas"]) == (0.7, 0.9)
        assert (group["lr"], group["eps"], group["weight_decay"]) == (0.2, 1e-5, 0.3)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bits_hold_the_moments(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = make_optimizer(Optim(name=name), [parameter])
    parameter.grad = torch.ones(64, 64)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


@pytest.mark.parametrize("warmup", [0, 5])
def test_prodigy_finds_its_rate(warmup: int) -> None:
    """On a bowl whose minimum is 3 away it walks there at lr=1, which AdamW at its first estimate would not."""
    optim = Optim(name="prodigy", lr=1.0, weight_decay=0.0, warmup=warmup)
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = make_optimizer(optim, [parameter])
    assert optimizer.param_groups[0]["safeguard_warmup"] == (warmup > 0)
    schedule = make_schedule(optim, optimizer, 200)
    for _ in range(200):
        optimizer.zero_grad()
        (parameter - 3).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert (parameter - 3).abs().max() < 0.3


def test_a_first_update_that_is_left_out_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer: Any = make_optimizer(Optim(lr=0.1), [parameter])
    for gradient, finite in ((torch.full((3,), math.nan), False), (torch.zeros(3), True)):
        parameter.grad = gradient
        norm = nn.utils.get_total_norm([gradient])
        step_if(optimizer, torch.tensor(finite), norm, 1.0)
        if not finite:
            assert torch.equal(parameter.data, torch.ones(3))
    state = optimizer.state[parameter]
    assert state["step"] == 1 and not state["exp_avg"].any() and parameter.isfinite().all()


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_an_update_that_the_device_decides_on_is_the_ordinary_one(clip: float) -> None:
    noise = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 3, generator=noise), torch.randn(7, generator=noise)]
    gradients = [[torch.randn(value.shape, generator=noise) for value in values] for _ in range(4)]
    bad = [torch.full_like(values[0], 2.0), torch.tensor([1.0, float("nan"), 3.0, 4.0, 5.0, float("inf"), 7.0])]

    def learn(decided: bool) -> tuple[list[torch.Tensor], Any]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        optimizer: Any = make_optimizer(Optim(lr=0.1, clip=clip), parameters)
        for step, each in enumerate([*gradients[:2], bad, *gradients[2:]]):
            for parameter, gradient in zip(parameters, each, strict=True):
                parameter.grad = gradient.clone()
            norm = nn.utils.get_total_norm(each)
            if decided:
                step_if(optimizer, norm.isfinite(), norm, clip)
            elif step != 2:
                nn.utils.clip_grads_with_norm_(parameters, clip or math.inf, norm)
                optimizer.step()
            if step == 2:  # as it was, for the dump that says where it was not finite
                assert torch.equal(parameters[1].grad.isnan(), bad[1].isnan())  # type: ignore[union-attr]
        return [parameter.data for parameter in parameters], optimizer.state_dict()

    (found, state), (expected, ordinary) = learn(True), learn(False)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7) and not torch.equal(a, values[0 if a.ndim == 2 else 1])
    assert [one["step"] for one in state["state"].values()] == [4.0, 4.0]
    assert state["state"].keys() == ordinary["state"].keys()
