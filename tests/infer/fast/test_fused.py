"""Blocks of fused operators against diffusers' and PEFT's own layers, and each operator against plain torch."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from torch.nn import functional

from infer.adapter.switch import switch
from infer.checkpoint.model import Model
from infer.fast import kept_attention
from infer.fast.add_product import add_product
from infer.fast.eight_bit import eight_of
from infer.fast.few_rows import few_rows_int8
from infer.fast.fused_activation import activated
from infer.fast.fused_gate import gated
from infer.fast.fused_heads import Heads, Rows, heads_and_rest, heads_of
from infer.fast.fused_linear import fused_linear, spare_columns
from infer.fast.fused_norm import normed
from infer.fast.install import install
from infer.fast.kept_attention import Kept
from infer.fast.memory import Memory
from infer.fast.thin import thin_of
from infer.fast.weights import Linear, Lora, Stack, dequantize, dequantize_at_once
from infer.quantize.precision import Precision
from tests.infer.fast.families import CPU, make, velocity
from tests.infer.fast.test_fast import ADAPTERS, error, exact, overall, step

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
each_device = pytest.mark.parametrize("device", ["cpu", GPU])
Make = Callable[..., Tensor]


@pytest.fixture
def normal() -> Make:
    """Random tensors that learn, in fp32, the same on each device."""
    noise = torch.Generator().manual_seed(0)

    def made(device: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(device).requires_grad_()

    return made


def compare(found: Any, expected: Any, learned: list[Tensor], bound: float = 2e-5) -> None:
    """Values, and the gradients of a sum of them with random signs, which the reference takes in fp64."""
    noise = torch.Generator().manual_seed(1)
    signs = [torch.randn(x.shape, generator=noise).to(x.device) for x in found]
    own = torch.autograd.grad(sum((x * s).sum() for x, s in zip(found, signs, strict=True)), learned)
    total = sum((x * s).sum() for x, s in zip(expected, signs, strict=True))
    true = torch.autograd.grad(total, learned)
    for a, b in zip([*found, *own], [*expected, *true], strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < bound, a.shape


@pytest.mark.parametrize("kind", ["fp32", "int8", "double"])
@pytest.mark.parametrize("adapter", ["rslora", "all layers", "dora"])
def test_output_and_gradients_are_those_of_the_plain_layers(kind: str, adapter: str, model: Model) -> None:
    precision = exact("nf4", double_quant=True) if kind == "double" else exact(kind)
    transformer, parameters = make(precision, ADAPTERS[adapter], model)
    expected = step(transformer, parameters, precision)
    for memory in (*map(Memory, ("nothing", "attention", "everything")), Memory("attention", keep_all=3)):
        install(transformer, memory, CPU, kernels=True)
        assert error(step(transformer, parameters, precision), expected) < 1e-5, memory


def test_in_bf16_they_are_no_further_from_fp32_than_the_compilers_blocks(model: Model) -> None:
    transformer, parameters = make(Precision("fp32"), ADAPTERS["lora"], model)
    truth = step(transformer, parameters, Precision("fp32"))
    precision = Precision("bf16")
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    found = []
    for kernels in (False, True):
        install(transformer, Memory(), CPU, kernels=kernels)
        found.append(overall(step(transformer, parameters, precision), truth))
    assert found[1] < 1.1 * found[0]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_what_is_computed_again_is_what_was_computed(adapter: str, model: Model) -> None:
    """Bit for bit in bf16, with quantized weights, where another form of a sum would round apart."""
    precision = Precision("nf4")
    transformer, parameters = make(precision, ADAPTERS[adapter], model)
    found = []
    for keep in ("everything", "attention"):
        install(transformer, Memory(keep), CPU, kernels=True)
        found.append(step(transformer, parameters, precision))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("products", ["fp8", "int8"])
def test_products_in_8_bits_are_as_near_as_in_the_compilers_blocks(products: str, model: Model) -> None:
    transformer, parameters = make(Precision("nf4"), ADAPTERS["lora"], model)
    install(transformer, Memory(), CPU)
    exactly, found = step(transformer, parameters, Precision("nf4")), []
    for kernels in (False, True):
        install(transformer, Memory(), CPU, products=products, kernels=kernels)
        found.append(overall(step(transformer, parameters, Precision("nf4")), exactly))
    assert 0.002 < found[1] < 1.1 * found[0]


def test_attention_is_computed_once_and_streamed_blocks_are_resident_ones(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attend = [], kept_attention._attend
    monkeypatch.setattr(kept_attention, "_attend", lambda *given: calls.append(1) or attend(*given))
    precision = Precision("nf4")
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    found = []
    for keep, computed in (("attention", 6), ("nothing", 12)):
        install(transformer, Memory(keep), CPU, kernels=True)
        calls.clear()
        found.append(step(transformer, parameters, precision))
        assert len(calls) == computed
    assert overall(*found) < 0.02  # the products are cut otherwise
    offload = install(transformer, Memory(budget_gib=1), CPU, kernels=True)
    assert offload is not None
    offload.set_resident(2)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(transformer, parameters, precision), found[0], strict=True))


@pytest.mark.parametrize("adapter", ["lora", "rslora", "all layers", "dora"])
def test_pictures_with_and_without_the_adapter(adapter: str, model: Model) -> None:
    """It is further columns of a product, or added to it: DoRA's, and where nothing norms the input just before."""
    precision = exact("nf4")
    transformer, _ = make(precision, ADAPTERS[adapter], model)

    def draw() -> list[Tensor]:
        found = []
        for on in (True, False):
            switch(transformer, on)
            with torch.no_grad():
                found.append(velocity(transformer, torch.Generator().manual_seed(3), (1, 8, 12), precision.dtype))
        switch(transformer, True)
        return found

    expected = draw()
    install(transformer, Memory(), CPU, kernels=True)
    assert error(draw(), expected) < 1e-5 and error(expected[:1], expected[1:]) > 1e-3


@each_device
@pytest.mark.parametrize("count", [1, 2])
def test_the_norm_and_the_gate(device: str, count: int, normal: Make) -> None:
    streams = [normal(device, 2, tokens, 96) for tokens in (5, 3)[:count]]
    mod = normal(device, 2, 288).detach()
    shift, scale, gate = mod.chunk(3, dim=-1)
    x = torch.cat(streams, dim=1).double()
    expected = functional.layer_norm(x, (96,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    compare(normed(shift, scale, *streams), [expected, *streams], streams)
    learned = [mod.clone().requires_grad_(), *streams]
    shift, scale, gate = learned[0].chunk(3, dim=-1)
    expected = functional.layer_norm(x, (96,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    compare(normed(shift, scale, *streams), [expected, *streams], learned)
    y = normal(device, 2, x.shape[1], 96)
    for learns in (False, True):
        gate = mod[:, 192:].requires_grad_() if learns else mod[:, 192:]
        parts = y.split([each.shape[1] for each in streams], dim=1)
        expected_ = [each + gate[:, None] * part for each, part in zip(streams, parts, strict=True)]
        compare(gated(gate, y, tuple(streams)), expected_, [y, *streams, *([gate] if learns else [])])


@each_device
@pytest.mark.parametrize("lengths", [(7,), (3, 5)])
def test_heads(device: str, lengths: tuple[int, ...], normal: Make) -> None:
    heads, width, tokens = 6, 16, sum(lengths)
    norms = tuple(normal(device, width).detach() for _ in range(2 * len(lengths)))
    angles = normal(device, tokens, width // 2).detach().repeat_interleave(2, dim=1)
    how = Heads(heads, norms, angles.cos(), angles.sin())
    products = [normal(device, 2, each, 3 * 96) for each in lengths]

    def plain(product: Tensor, start: int, q: Tensor, k: Tensor) -> list[Tensor]:
        parts = [part.double().unflatten(-1, (heads, -1)) for part in product[..., :288].split(96, dim=-1)]
        turn = torch.polar(torch.ones_like(angles), angles)[start : start + product.shape[1], ::2].to(torch.complex128)
        for i, norm in enumerate((q, k)):
            own = functional.rms_norm(parts[i], (width,), norm.double(), 1e-6)
            pairs = torch.view_as_complex(own.unflatten(-1, (-1, 2)).contiguous()) * turn[None, :, None]
            parts[i] = torch.view_as_real(pairs).flatten(-2)
        return parts

    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    every = [plain(each, starts[i], *norms[2 * i : 2 * i + 2]) for i, each in enumerate(products)]
    expected = [torch.cat(parts, dim=1) for parts in zip(*every, strict=True)]
    compare(heads_of(how, *products), expected, products)
    if len(lengths) == 1:  # and what lies behind them, through the activation that writes its gradient there
        product, rows = normal(device, 2, 7, 288 + 40), Rows()
        q, k, v, hidden = heads_and_rest(how, product, rows)
        expected = [*plain(product, 0, *norms), functional.gelu(product[..., 288:].double(), approximate="tanh")]
        compare([q, k, v, activated("gelu", hidden, None, rows, 288)], expected, [product])


@each_device
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("behind", [False, True])
def test_the_activation(device: str, kind: str, behind: bool, normal: Make) -> None:
    hidden, attended = normal(device, 2, 5, 2200), normal(device, 2, 5, 48) if behind else None
    x = hidden.double()
    y = functional.gelu(x, approximate="tanh")
    if kind == "swiglu":
        y = functional.silu(x[..., :1100]) * x[..., 1100:]
    expected = y if attended is None else torch.cat([attended.double(), y], dim=-1)
    compare([activated(kind, hidden, attended)], [expected], [hidden, *([] if attended is None else [attended])])


@each_device
@pytest.mark.parametrize("ranks", [((4,), (4,), (4,), ()), ((), (3,), (3,)), ((16,),), ((4, 3), (), (2,)), ((8,),) * 5])
def test_adapters_as_two_thin_matrices(device: str, ranks: tuple[tuple[int, ...], ...], normal: Make) -> None:
    widths, strength = (32, 96, 48, 64, 16)[: len(ranks)], torch.tensor(0.7, device=device)
    adapters = tuple(
        tuple(Lora(normal(device, rank, 80), normal(device, width, rank), strength, None) for rank in own)
        for own, width in zip(ranks, widths, strict=True)
    )
    frozen = Stack("plain", (sum(widths), 80), widths, normal(device, sum(widths), 80).detach(), None, None, None)
    thin = thin_of(Linear(frozen, adapters), torch.float32)
    assert thin is not None and thin.down.shape[0] % 8 == 0
    whole = torch.zeros(sum(widths), 80, device=device)
    found = torch.cat([whole[: thin.first], thin.up @ thin.down, whole[thin.first + thin.up.shape[0] :]])
    parts = [
        sum((lora.up.double() @ lora.down.double() * strength for lora in own), torch.zeros(width, 80, device=device))
        for own, width in zip(adapters, widths, strict=True)
    ]
    learned = [tensor for own in adapters for lora in own for tensor in (lora.down, lora.up)]
    compare([found], [torch.cat(parts)], learned)
    assert thin_of(Linear(frozen, ((),) * len(widths)), torch.float32) is None


@each_device
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (None, 3, None), (8, None, 3)])
@pytest.mark.parametrize("keep", ["everything", "attention"])
def test_gains_of_dora(device: str, biased: bool, ranks: tuple[int | None, ...], keep: str, normal: Make) -> None:
    """Against the weights, their norms and the products as DoRA's paper writes them, in fp64."""
    widths, strength = (32, 300, 48), torch.tensor(0.7, device=device)
    frozen = normal(device, sum(widths), 80).detach()
    bias = normal(device, sum(widths)).detach() if biased else None
    adapters = tuple(
        ()
        if rank is None
        else (Lora(normal(device, rank, 80), normal(device, width, rank), strength, normal(device, width)),)
        for rank, width in zip(ranks, widths, strict=True)
    )
    layers = Linear(Stack("plain", (sum(widths), 80), widths, frozen, None, None, bias), adapters)
    x = normal(device, 2, 700, 80)

    def plain() -> Tensor:
        expected = []
        for own, part in zip(adapters, frozen.double().split(widths), strict=True):
            weights = part
            if own:
                assert own[0].magnitude is not None
                weights = weights + strength.double() * own[0].up.double() @ own[0].down.double()
                weights = weights * (own[0].magnitude.double() / weights.detach().norm(dim=1))[:, None]
            expected.append(x.double() @ weights.T)
        return torch.cat(expected, dim=-1) + (0 if bias is None else bias.double())

    learned = [
        x,
        *(t for own in adapters for lora in own for t in (lora.down, lora.up, lora.magnitude) if t is not None),
    ]
    kept = Kept()
    with kept.active(again=False), torch.no_grad():
        assert error([fused_linear(x, layers, again=False)], [plain()]) < 1e-5
    with kept.active(again=keep == "attention"):
        found = fused_linear(x, layers, again=keep == "attention", value=keep == "everything")
    compare([found], [plain()], learned)
    still = tuple(tuple(Lora(*(None if t is None else t.detach() for t in lora)) for lora in own) for own in adapters)
    compare([fused_linear(x, layers._replace(adapters=still), again=False)], [plain()], [x])


def quantized(device: str, kind: str, nested: bool, weights: list[Tensor]) -> Stack:
    widths = tuple(len(each) for each in weights)
    shape = sum(widths), weights[0].shape[1]
    if kind == "int8":
        whole = torch.cat(weights)
        scale = whole.abs().amax(1)
        codes = (whole / scale[:, None] * 127).round().to(torch.int8)
        return Stack(kind, shape, widths, codes.to(device), scale.to(device), None, None)
    packed = [bnb.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=64) for w in weights]
    states, extra = [state for _, state in packed], None
    if nested:
        outer, offsets = (torch.cat([s.state2.absmax for s in states]), torch.stack([s.offset for s in states]))
        extra = outer.to(device), states[0].state2.code.to(device), offsets.to(device)
    stored, scale = torch.cat([codes for codes, _ in packed]), torch.cat([s.absmax for s in states])
    return Stack(kind, shape, widths, stored.to(device), scale.to(device), extra, None)


STORED = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]
each_stored = pytest.mark.parametrize(("kind", "nested"), STORED)


@each_device
@each_stored
@pytest.mark.parametrize("spare", [0, 64])
def test_weights_dequantized_at_once(device: str, kind: str, nested: bool, spare: int, normal: Make) -> None:
    stack = quantized(device, kind, nested, [normal("cpu", width, 256).detach() for width in (64, 128, 320, 64)])
    for dtype in (torch.bfloat16, torch.float32):
        found = dequantize_at_once(stack, dtype, spare)
        assert found.shape == (576, 256 + spare) and torch.equal(found[:, :256], dequantize(stack, dtype))


@each_device
@each_stored
@pytest.mark.parametrize("ranks", [((), (4,), (4,), ()), ((16,), (16,), (16,), (16,)), ((), (8, 3), (), (2,))])
def test_adapters_as_further_columns_of_the_product(
    device: str, kind: str, nested: bool, ranks: tuple[tuple[int, ...], ...], normal: Make
) -> None:
    """Against the weights with the update in them, in fp64."""
    widths, strength = (64, 128, 320, 64), torch.tensor(0.5, device=device)
    stack = quantized(device, kind, nested, [normal("cpu", width, 256).detach() for width in widths])
    bias = normal(device, 576).detach()
    stack = stack._replace(bias=bias)
    adapters = tuple(
        tuple(Lora(normal(device, rank, 256), normal(device, width, rank), strength, None) for rank in own)
        for own, width in zip(ranks, widths, strict=True)
    )
    layers = Linear(stack, adapters)
    weights = dequantize(stack, torch.float32).double()
    for i, own in enumerate(adapters):
        for lora in own:
            weights[sum(widths[:i]) : sum(widths[: i + 1])] += 0.5 * (lora.up.double() @ lora.down.double()).detach()
    shift, scale, x = (normal(device, *shape).detach() for shape in ((2, 256), (2, 256), (2, 30, 256)))
    spare = spare_columns(layers)
    with torch.no_grad():
        given, _ = normed(shift, scale, x, spare=spare)
        assert spare == 64 and given.shape == (2, 30, 320)
        found = fused_linear(given, layers, again=False)
        alone, _ = normed(shift, scale, x)
        assert torch.allclose(given[..., :256], alone, atol=1e-5)  # kernels of two widths may round apart
    expected = alone.double() @ weights.T + bias.double()
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_where_adapters_are_no_further_columns(normal: Make) -> None:
    stack = quantized("cpu", "nf4", False, [normal("cpu", 64, 128).detach()])
    lora = Lora(normal("cpu", 16, 128), normal("cpu", 64, 16), torch.tensor(1.0), None)
    plain = stack._replace(kind="plain", stored=normal("cpu", 64, 128), scale=None)
    eight = stack._replace(eight=eight_of(stack, "fp8", CPU))
    high = lora._replace(down=normal("cpu", 264, 128), up=normal("cpu", 64, 264))
    with torch.no_grad():
        assert spare_columns(Linear(stack, ((lora,),))) == 64
        for frozen, adapters in (
            (stack, ()),
            (plain, (lora,)),
            (eight, (lora,)),
            (stack, (high,)),
            (stack, (lora._replace(magnitude=normal("cpu", 64)),)),
        ):
            assert spare_columns(Linear(frozen, (adapters,))) == 0


def test_a_small_update_survives_as_further_columns(normal: Make) -> None:
    """On average. Of one that is added to the rounded product, half is lost."""
    stack = quantized("cpu", "nf4", False, [normal("cpu", 256, 256).detach()])
    x = normal("cpu", 512, 256).detach().bfloat16()
    down, up = normal("cpu", 8, 256).detach(), normal("cpu", 256, 8).detach()
    update = x.float() @ (up @ down).T
    base = x.float() @ dequantize(stack, torch.bfloat16).float().T
    up *= 1e-3 * base.norm() / update.norm()
    update = x.float() @ (up @ down).T
    layers = Linear(stack, ((Lora(down, up, torch.tensor(1.0), None),),))
    added = fused_linear(x, layers, again=False)
    with torch.no_grad():
        columns = fused_linear(functional.pad(x, (0, spare_columns(layers))), layers, again=False)

    def kept(y: Tensor) -> float:
        return float(((y.float() - base) * update).sum() / update.square().sum())

    assert 0.98 < kept(columns) < 1.02 and kept(added) < 0.8


@each_device
def test_few_rows_with_int8_weights(device: str, normal: Make) -> None:
    stack = quantized(device, "int8", False, [normal("cpu", 100, 600).detach()])
    x = normal(device, 3, 600).detach()
    assert stack.scale is not None
    found, expected = few_rows_int8(x, stack.stored, stack.scale), x.double() @ dequantize(stack, torch.float64).T
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@each_device
@pytest.mark.parametrize(("rank", "starts"), [(8, []), (48, []), (264, []), (24, [128, 256]), (96, [256, 384, 640])])
@pytest.mark.parametrize("how", ["added", "with gains", "with gains and a bias"])
def test_a_product_is_added_to_part_of_a_tensor(
    device: str, rank: int, starts: list[int], how: str, normal: Make
) -> None:
    """In bf16; 264 is beyond the kernel's ranks. starts: of blocks along the weight's diagonal."""
    shapes = (2, 70, 900), (2, 70, rank), (700, rank), (700,), (700,)
    whole, x, weight, gain, bias = (normal(device, *shape).detach() for shape in shapes)
    own = rank // (1 + len(starts))
    if starts:
        ends = [0, *starts, 700]
        blocks = [weight[a:b, :own] for a, b in pairwise(ends)]
        weight = torch.block_diag(*blocks)
    whole, x, weight, bias = (tensor.bfloat16() for tensor in (whole, x, weight, bias))
    y, least = whole.clone(), bias.double() if "bias" in how else 0.0
    gains, biases = gain if "gains" in how else None, bias if "bias" in how else None
    add_product(y[..., 100:800], x, weight, gains, biases, starts)
    expected = whole.double()
    added = expected[..., 100:800] + x.double() @ weight.double().T
    expected[..., 100:800] = (added - least) * (gain.double() if "gains" in how else 1.0) + least
    assert float((y - expected).norm() / expected.norm()) < 3e-3
    assert torch.equal(y[..., :100], whole[..., :100]) and torch.equal(y[..., 800:], whole[..., 800:])
