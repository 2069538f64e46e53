"""The fast path against diffusers' and PEFT's own layers: outputs, gradients, switches, streaming, full-size shapes."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from diffusers import FluxTransformer2DModel
from torch import Tensor

from infer.adapter.attach import attach, put_pairs
from infer.adapter.attached import adapter_pairs, adapter_state
from infer.adapter.lora import Adapter
from infer.adapter.switch import switch
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.family import flux1_sizes as shapes
from infer.fast import install as fast
from infer.fast.add_product import add_product
from infer.fast.blocks import linear
from infer.fast.dequantize import dequantize_4bit
from infer.fast.install import install, uninstall
from infer.fast.memory import KEEP, Memory, device_bytes, residents
from infer.fast.weights import Linear, Lora, Stack, obstacle
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import KINDS, Precision, check_quantized, linear_layers
from infer.quantize.storage import stored_bytes
from infer.sample.encode import text_encoder
from tests.infer.fast.families import CPU, load, make, velocity
from train.objective.flow_matching import predict

ADAPTERS = {
    "lora": Adapter(rank=4, targets="attention+mlp"),
    "rslora": Adapter(rank=3, alpha=5.0, rslora=True),
    "dora": Adapter(rank=4, dora=True, targets="attention+mlp"),
    "all layers": Adapter(rank=4, targets="all"),
}


def step(transformer: Any, parameters: list[Tensor], precision: Precision) -> list[Tensor]:
    """The output and the gradient of every adapter parameter, at two pictures of other than square size."""
    for parameter in parameters:
        parameter.grad = None
    out = velocity(transformer, torch.Generator().manual_seed(2), (2, 6, 10), precision.dtype)
    out.square().mean().backward()
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def overall(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative error of all gradients together."""
    a, b = (torch.cat([x.flatten() for x in part[1:]]) for part in (found, expected))
    return float((a - b).norm() / b.norm())


def exact(kind: str, **options: Any) -> Precision:
    """Products in fp32: what remains is the order of sums."""
    return Precision(kind, compute_dtype="fp32", **options)


# a strength and layers outside of the blocks go with any kind of weights: each with some
@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        *product(("lora", "dora"), ("fp32", "int8", "fp4", "nf4", "double")),
        ("rslora", "nf4"),
        *product(("all layers",), ("fp32", "int8", "double")),
    ],
)
def test_output_and_gradients_are_those_of_the_plain_layers(kind: str, adapter: str, model: Model) -> None:
    precision = exact("nf4", double_quant=True) if kind == "double" else exact(kind)
    transformer, parameters = make(precision, ADAPTERS[adapter], model)
    expected = step(transformer, parameters, precision)
    for memory in (*map(Memory, KEEP), Memory("attention", keep_all=3), Memory("nothing", unpacked=True)):
        install(transformer, memory, CPU)
        assert error(step(transformer, parameters, precision), expected) < 2e-5, memory
    uninstall(transformer)
    assert all(torch.equal(a, b) for a, b in zip(step(transformer, parameters, precision), expected, strict=True))


def test_bf16_gradients_are_no_further_from_fp32_than_the_plain_layers_are(model: Model) -> None:
    transformer, parameters = make(Precision("fp32"), ADAPTERS["lora"], model)
    truth = step(transformer, parameters, Precision("fp32"))
    precision = Precision("bf16")
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    with torch.autocast("cpu", torch.bfloat16):  # as PEFT's fp32 adapters are trained beside bf16 layers
        plain = overall(step(transformer, parameters, precision), truth)
    install(transformer, Memory(), CPU)
    assert overall(step(transformer, parameters, precision), truth) < min(0.02, 1.3 * plain)


def test_compiled_is_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is compiled once: for validation, training, pictures without the adapter, other sizes, and a second model."""
    # traced, differentiated and partitioned as on a GPU, but not lowered to kernels
    monkeypatch.setattr(fast, "BACKEND", "aot_eager")
    precision = exact("nf4", double_quant=True)
    transformer, parameters = make(precision, ADAPTERS["rslora"], model)
    expected = step(transformer, parameters, precision)

    def draw(shape: tuple[int, int, int]) -> Tensor:
        with torch.no_grad():
            return velocity(transformer, torch.Generator().manual_seed(3), shape, precision.dtype)

    def without() -> Tensor:
        switch(transformer, False)
        try:
            return draw((2, 8, 12))
        finally:
            switch(transformer, True)

    keep = "nothing" if isinstance(transformer, FluxTransformer2DModel) else "products"
    shapes = (2, 6, 10), (2, 8, 12)
    plain, base = [draw(shape) for shape in shapes], without()
    install(transformer, Memory(keep=keep, compile=True), CPU)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert error([draw(shape) for shape in shapes], plain) < 1e-5
    assert error(step(transformer, parameters, precision), expected) < 1e-5
    assert error([without()], [base]) < 1e-5 and error([base], [plain[1]]) > 1e-3
    assert not any(parameter.grad is None for parameter in parameters)
    transformer, parameters = make(precision, ADAPTERS["rslora"], model)
    install(transformer, Memory(keep=keep, compile=True), CPU)
    assert error(step(transformer, parameters, precision), expected) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # one for each form of block


@pytest.mark.parametrize("kind", ["fp32", "int8", "nf4"])
def test_stacked_weights_are_stored_once_and_stay_the_layers_own(kind: str, model: Model) -> None:
    transformer = load(model, exact(kind))
    before, plain = stored_bytes(transformer), load(model, exact(kind))
    install(transformer, Memory(), CPU)
    assert stored_bytes(transformer) == before
    block: Any = transformer.transformer_blocks[0]
    q, k = (layer.weight.untyped_storage().data_ptr() for layer in (block.attn.to_q, block.attn.to_k))
    assert q == k  # one storage for layers that read one input
    mine, own = transformer.state_dict(), plain.state_dict()
    assert mine.keys() == own.keys()
    assert all(torch.equal(mine[key].reshape(-1), own[key].reshape(-1)) for key in own)


def test_adapters_attached_and_switched_after_installing_count(model: Model) -> None:
    precision = exact("nf4")
    source, _ = make(precision, ADAPTERS["lora"], model)
    transformer = load(model, precision)
    install(transformer, Memory(), CPU)

    def draw(drawing: Any) -> Tensor:
        with torch.no_grad():
            return velocity(drawing, torch.Generator().manual_seed(3), (1, 8, 8), precision.dtype)

    base = draw(transformer)
    put_pairs(transformer, adapter_pairs(source), "mine")
    adapted, expected = draw(transformer), draw(source)
    assert error([adapted], [expected]) < 1e-5 and error([base], [expected]) > 1e-2
    switch(transformer, False)
    assert torch.equal(draw(transformer), base)
    switch(transformer, True)
    transformer.set_adapters("mine", 0.5)
    assert not torch.allclose(draw(transformer), adapted)
    assert adapter_state(transformer, "mine").keys() == adapter_state(source).keys()


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_adapters_loaded_in_bf16_draw_what_they_were_trained_to(kind: str, adapter: str, model: Model) -> None:
    precision = Precision(kind)
    source, _ = make(exact(kind) if kind != "bf16" else Precision("fp32"), ADAPTERS[adapter], model)
    transformer = load(model, precision)

    def draw(drawing: Any, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return velocity(drawing, torch.Generator().manual_seed(3), (1, 8, 8), dtype)

    expected = draw(source, torch.float32)
    put_pairs(transformer, adapter_pairs(source), "mine")
    plain = error([draw(transformer, torch.bfloat16)], [expected])
    install(transformer, Memory(), CPU)
    assert error([draw(transformer, torch.bfloat16)], [expected]) < max(0.02, 1.3 * plain)
    switch(transformer, False)
    assert error([draw(transformer, torch.bfloat16)], [expected]) > 0.05  # the adapter counts
    layer: Any = transformer.transformer_blocks[0].attn.to_q
    assert layer.lora_A["mine"].weight.dtype == compute_dtype(torch.bfloat16, CPU)
    if adapter == "dora":
        assert layer.lora_magnitude_vector["mine"].weight.dtype == torch.float32


@pytest.mark.parametrize(("kind", "resident"), [("nf4", 0), ("double", 3), ("int8", 1), ("bf16", 6)])
def test_streamed_blocks_compute_bit_for_bit_what_resident_ones_do(kind: str, resident: int, model: Model) -> None:
    precision = Precision("nf4", double_quant=True) if kind == "double" else Precision(kind)
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    install(transformer, Memory(), CPU)
    expected = step(transformer, parameters, precision)
    offload = install(transformer, Memory(budget_gib=1), CPU)
    assert offload is not None and len(offload.blocks) == 6
    assert offload.host_bytes > 0.4 * stored_bytes(transformer)
    offload.set_resident(resident)
    assert len(offload.offloaded) == 6 - resident
    for _ in range(2):  # the second finds the slots as the first left them
        assert all(torch.equal(a, b) for a, b in zip(step(transformer, parameters, precision), expected, strict=True))
    with torch.no_grad():  # sampling goes round and round instead of forth and back
        for slot in offload.slots:
            slot.fill_(255)  # what is not copied when needed would show
        offload.holds = [None] * len(offload.slots)
    assert all(torch.equal(a, b) for a, b in zip(step(transformer, parameters, precision), expected, strict=True))


@pytest.mark.parametrize(("resident", "waits"), [(6, False), (3, False), (2, True)])
def test_a_stream_waits_for_its_own_copies_alone(
    resident: int, waits: bool, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step is captured, waiting for copies from before it is an error; CUDA played by hand."""
    transformer, parameters = make(Precision("nf4"), ADAPTERS["lora"], tiny)
    offload: Any = install(transformer, Memory(budget_gib=1), CPU)
    offload.set_resident(resident)
    waited: list[str] = []
    current = SimpleNamespace(wait_stream=lambda _: waited.append("all"), wait_event=lambda _: waited.append("one"))
    offload.copy_stream = SimpleNamespace(wait_stream=lambda _: None, record_event=lambda: "event")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    step(transformer, parameters, Precision("nf4"))
    offload.rewind()
    waited.clear()
    step(transformer, parameters, Precision("nf4"))  # what is captured
    offload.join()
    assert bool(waited) == waits and offload.arriving == [None] * len(offload.slots)


def test_more_blocks_stay_with_more_room_and_the_last_need_no_slots() -> None:
    sizes = [5] * 3 + [2] * 6
    found = [residents(sizes, room) for room in range(3 * 5, sum(sizes) + 1)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == len(sizes)
    for room, count in zip(range(3 * 5, sum(sizes) + 1), found, strict=True):
        assert device_bytes(sizes, count) <= room
    assert device_bytes(sizes, len(sizes)) == sum(sizes) < device_bytes(sizes, len(sizes) - 1) + 2


def test_a_budget_holds_with_the_holes_that_come_with_resident_blocks(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, _ = make(Precision("nf4"), ADAPTERS["lora"], tiny)
    offload = install(transformer, Memory(budget_gib=1), CPU)
    assert offload is not None
    sizes = [buffer.numel() for buffer in offload.host]
    work, holes, forgotten = 100 * max(sizes), 2 * max(sizes), []
    offload.graphs.append(lambda: forgotten.append(len(offload.offloaded)))

    def taken(_: Any) -> int:
        resident = len(sizes) - len(offload.offloaded)
        return work + device_bytes(sizes, resident) + (holes if resident else 0)

    monkeypatch.setattr(offload, "_taken", taken)

    def fit(extra: int) -> int:
        return offload.fit((work + extra) / 2**30, lambda: None)

    assert fit(sum(sizes) + holes) == 6 and not offload.offloaded
    least = device_bytes(sizes, 0)
    assert fit(least) == 0 and len(offload.offloaded) == 6
    some = fit(sum(sizes))  # all of them would fit but for the holes
    assert 0 <= some < 6 and taken(None) <= work + sum(sizes)
    assert forgotten and fit(least + max(sizes)) == 0
    with pytest.raises(ValueError, match="with every block in host memory the work itself takes"):
        fit(least - 1)


@pytest.mark.parametrize("ranks", [((), (4, 3), (), (2,), ()), ((4,), (4,), (4,), (), ()), ((), (), (), (5,), (5,))])
def test_updates_added_in_place_are_those_that_are_not(ranks: tuple[tuple[int, ...], ...]) -> None:
    noise = torch.Generator().manual_seed(0)

    def lora(rank: int, width: int) -> Lora:
        down, up = torch.randn(rank, 32, generator=noise), torch.randn(width, rank, generator=noise)
        return Lora(down, up, torch.tensor(0.7), None)

    widths = 32, 32, 48, 64, 16
    adapters = tuple(tuple(lora(rank, width) for rank in own) for own, width in zip(ranks, widths, strict=True))
    weights, x = torch.randn(sum(widths), 32, generator=noise), torch.randn(2, 10, 32, generator=noise)
    frozen = Stack("plain", (sum(widths), 32), widths, weights, None, None, torch.randn(sum(widths), generator=noise))
    leaves = [x.requires_grad_(), *(tensor.requires_grad_() for own in adapters for one in own for tensor in one[:2])]
    signs = torch.randn(2, 10, sum(widths), generator=noise)

    def taken(run: Any, in_place: bool) -> list[Tensor]:
        outputs = run(x, Linear(frozen._replace(in_place=in_place), adapters))
        return [*outputs, *torch.autograd.grad((torch.cat(outputs, dim=-1) * signs).sum(), leaves)]

    expected = taken(linear, False)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for run in (linear, compiled):
        assert error(taken(run, True), expected) < 1e-5
        with torch.no_grad():
            outputs = run(x, Linear(frozen, adapters))
            assert error(outputs, expected[: len(widths)]) < 1e-5
            before = linear(x, Linear(frozen, ((),) * 5))
    changed = [not torch.equal(a, b) for a, b in zip(outputs, before, strict=True)]
    assert changed == [bool(own) for own in adapters]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantizing_a_stack_is_dequantizing_each_layer(kind: str, nested: bool) -> None:
    parts = [torch.randn(rows, 256) for rows in (64, 64, 128, 320)]
    packed = [bnb.quantize_4bit(part, quant_type=kind, compress_statistics=nested, blocksize=64) for part in parts]
    states = [state for _, state in packed]
    extra: tuple[Any, Any, Any] = (None, None, None)
    if nested:
        outer = torch.cat([state.state2.absmax for state in states])
        extra = outer, states[0].state2.code, torch.stack([state.offset for state in states])
    stored, scale = torch.cat([codes for codes, _ in packed]), torch.cat([state.absmax for state in states])
    ends = [256, 512, 1024, 2304]
    found = dequantize_4bit(stored, scale, *extra, ends, kind, [576, 256], torch.bfloat16, 0)
    expected = torch.cat([bnb.dequantize_4bit(codes, state) for codes, state in packed]).bfloat16()
    assert torch.equal(found, expected)


def test_what_the_fast_path_does_not_cover_is_named(model: Model) -> None:
    for adapter, reason in ((Adapter(rank=4), None), (Adapter(rank=4, dropout=0.1), "adapter.dropout is above 0")):
        transformer = load(model, Precision("bf16"))
        attach(transformer, adapter, 0)
        assert obstacle(transformer) == reason
    transformer = load(model, Precision("bf16"))
    attach(transformer, Adapter(rank=4), 0)
    transformer.fuse_lora()
    assert "merged" in str(obstacle(transformer))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"keep": "all"}, "memory.keep is 'all'"),
        ({"fused": False}, "memory.keep is attention"),
        ({"fused": False, "keep": "nothing", "graph": True}, "memory.graph=True needs"),
        ({"budget_gib": 0.0}, "memory.budget_gib is 0.0"),
    ],
)
def test_memory_settings_that_cannot_be_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Memory(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_at_every_precision(kind: str, random_model: Model) -> None:
    precision = Precision(kind)
    transformer = load_transformer(random_model, precision, CPU)
    layers = linear_layers(transformer)
    assert check_quantized(transformer, precision) == (len(layers) if precision.quantized else 0)
    again = load_transformer(random_model, precision, CPU).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in transformer.state_dict().items())
    parameters: list[Tensor] = list(attach(transformer, Adapter(rank=4), 0))
    install(transformer, Memory(), CPU)
    found = step(transformer, parameters, precision)
    assert all(x.isfinite().all() for x in found) and 0.1 < float(found[0].std()) < 10


def test_every_part_of_a_random_model_works(random_model: Model) -> None:
    precision = Precision("nf4")
    with text_encoder(random_model, precision, CPU, None) as encoder:
        first, second = encoder(["a red star", "a blue heart"])
        assert first.embeds.shape == (512, 64) and first.pooled.shape == (768,)
        assert not torch.equal(first.embeds, second.embeds) and not torch.equal(first.pooled, second.pooled)
    vae = load_vae(random_model, CPU)
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 64, 64).bfloat16()).latent_dist.mean
        assert latents.shape == (1, 16, 8, 8) and latents.isfinite().all()
        assert vae.decode(latents).sample.isfinite().all()
    assert load_scheduler(random_model).config.use_dynamic_shifting


def test_full_size_shapes_are_flux_dev() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**shapes.DEV["transformer"])
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320  # black-forest-labs/FLUX.1-dev


def test_random_weights_of_an_unknown_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights=random knows the sizes of .*FLUX.1-dev"):
        Model("someone/else", weights="random")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [8, 24, 40, 256, 264])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_adds_products_and_touches_nothing_else(rank: int, dtype: torch.dtype) -> None:
    noise = torch.Generator("cuda").manual_seed(0)
    whole = torch.randn(2, 77, 1000, dtype=dtype, device="cuda", generator=noise)
    thin = torch.randn(2, 77, rank, dtype=dtype, device="cuda", generator=noise)
    up = torch.randn(520, rank, dtype=dtype, device="cuda", generator=noise)
    found = whole.clone()
    add_product(found[..., 136:656], thin, up)
    expected = whole.double()
    expected[..., 136:656] += thin.double() @ up.double().T
    assert (found.double() - expected).norm() / expected.norm() < (3e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.equal(found[..., :136], whole[..., :136]) and torch.equal(found[..., 656:], whole[..., 656:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp4", "nf4", "double"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_blocks_of_a_checkpoint_held_on_the_host_are_those_on_the_gpu(kind: str, adapter: str, tiny: Model) -> None:
    precision = Precision("nf4", double_quant=True) if kind == "double" else Precision(kind)
    device, found = torch.device("cuda"), []
    for hold in (device, CPU):
        transformer = load_transformer(tiny, precision, device, hold).train()
        assert check_quantized(transformer, precision) == (0 if kind == "bf16" else len(linear_layers(transformer)))
        attach(transformer, ADAPTERS[adapter], 0)
        memory = Memory(compile=False, budget_gib=None if hold == device else 1.0)
        offload = install(transformer, memory, device)
        assert (offload is None) == (hold == device)
        if offload is not None:
            offload.set_resident(2)
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(1, transformer.config.in_channels // 4, 16, 16, generator=noise).to(device)
        t5 = torch.randn(1, 20, transformer.config.joint_attention_dim, generator=noise).to(device)
        pooled = torch.randn(1, transformer.config.pooled_projection_dim, generator=noise).to(device)
        with torch.no_grad():
            sigma = torch.tensor([0.5], device=device)
            found.append(predict(transformer, x, t5, pooled, sigma, 1.0, precision.dtype))
    assert torch.equal(*found)
