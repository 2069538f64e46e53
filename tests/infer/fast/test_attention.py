"""The attention whose gradient repeats itself, against torch's own in fp64; and the mode that asks for it."""

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from infer.adapter.attach import own_random
from infer.checkpoint.model import Model
from infer.fast import install as fast
from infer.fast.attention import attention_forward, attention_gradient, repeatable_attention
from infer.fast.install import Memory, install
from tests.infer.fast.families import CPU, make
from tests.infer.fast.test_fast import ADAPTERS, error, exact, step
from train.loop.repeat import repeating


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v and a gradient [2, 3, tokens, 32]; v is a part of wider rows, as of one product for all three."""
    noise = torch.Generator().manual_seed(tokens)
    q, k, g = (torch.randn(2, tokens, 3, 32, generator=noise).transpose(1, 2) for _ in range(3))
    wide = torch.randn(2, tokens, 288, generator=noise)
    return [q, k, wide[..., 96:192].unflatten(-1, (3, 32)).transpose(1, 2), g]


@pytest.mark.parametrize("tokens", [1, 64, 75])
def test_value_and_gradients_are_those_of_softmax_attention(tokens: int) -> None:
    *qkv, gradient = inputs(tokens)
    exactly = [x.double().requires_grad_() for x in qkv]
    expected = functional.scaled_dot_product_attention(*exactly)
    expected.backward(gradient.double())
    own = [x.detach().requires_grad_() for x in qkv]
    out = repeatable_attention(*own)
    out.backward(gradient)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(own, exactly, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    _, logsumexp = attention_forward(*qkv)
    scores = exactly[0] @ exactly[1].mT / math.sqrt(32)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_compiler_is_told_the_truth_about_both_operators() -> None:
    *qkv, gradient = inputs(20)
    torch.library.opcheck(attention_forward, tuple(qkv), test_utils=("test_schema", "test_faketensor"))
    out, logsumexp = attention_forward(*qkv)
    arguments = gradient, *qkv, logsumexp, (gradient * out).sum(-1)
    torch.library.opcheck(attention_gradient, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("keep", ["nothing", "attention"])
def test_blocks_that_repeat_themselves_learn_the_same(keep: str, model: Model) -> None:
    precision = exact("nf4")
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    expected = step(transformer, parameters, precision)
    install(transformer, Memory(keep), CPU, repeatable=True)
    assert error(step(transformer, parameters, precision), expected) < 1e-5


def test_compiled_they_do_too(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced, differentiated and partitioned as on a GPU, but not lowered to kernels
    monkeypatch.setattr(fast, "BACKEND", "aot_eager")
    precision = exact("nf4")
    transformer, parameters = make(precision, ADAPTERS["lora"], tiny)
    expected = step(transformer, parameters, precision)
    install(transformer, Memory("attention", compile=True), CPU, repeatable=True)
    assert error(step(transformer, parameters, precision), expected) < 1e-5


def test_the_mode_is_left_as_it_was_found() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    before = flags()
    with repeating(False):
        assert flags() == before
    with pytest.raises(KeyError), repeating(True):
        assert flags() == (True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        raise KeyError
    assert flags() == before


def test_what_is_drawn_within_changes_nothing_after_it() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with own_random():
        torch.manual_seed(6)
        torch.rand(3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [75, 1536])
def test_on_a_gpu_it_is_as_near_as_torchs_own_and_repeats_itself(tokens: int, dtype: torch.dtype) -> None:
    *qkv, gradient = (x.to("cuda", dtype) for x in inputs(tokens))
    exactly = [x.double().requires_grad_() for x in qkv]
    functional.scaled_dot_product_attention(*exactly).backward(gradient.double())

    def gradients(attend: object) -> list[Tensor]:
        own = [x.detach().requires_grad_() for x in qkv]
        return list(torch.autograd.grad(attend(*own), own, gradient))  # type: ignore[operator]

    mine, other = gradients(repeatable_attention), gradients(functional.scaled_dot_product_attention)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(gradients(repeatable_attention), mine, strict=True))
    for a, b, truth in zip(mine, other, exactly, strict=True):
        assert truth.grad is not None
        distance = [float((x.double() - truth.grad).norm() / truth.grad.norm()) for x in (a, b)]
        assert distance[0] < max(1.5 * distance[1], 1e-5)
