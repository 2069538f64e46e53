"""What the fast path must do for a transformer of any family: adapters together, mixtures, compilations, capture."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infer.adapter.attach import attach, put_pairs
from infer.adapter.attached import adapter_pairs
from infer.adapter.lora import RECOVERY, Adapter
from infer.adapter.switch import set_adapters
from infer.checkpoint.model import Model
from infer.fast import install as fast
from infer.fast.cuda_graph import Sampler
from infer.fast.group import Group
from infer.fast.install import install, uninstall
from infer.fast.memory import KEEP, Memory
from infer.fast.weights import Stack, can_cut, dequantize, rows_of
from infer.quantize.compute import compute_dtype, compute_dtype_of
from infer.quantize.precision import Precision
from tests.infer.fast.families import CPU, load, make, velocity
from tests.infer.fast.test_fast import ADAPTERS, error, exact, step


def drawn(transformer: Any) -> Tensor:
    with torch.no_grad():
        return velocity(transformer, torch.Generator().manual_seed(3), (1, 8, 8), torch.float32)


def add(transformer: Any, name: str, model: Model, adapter: Adapter, seed: int) -> None:
    """An adapter whose update is not zero, frozen."""
    source, _ = make(exact("nf4"), adapter, model)
    noise = torch.Generator().manual_seed(seed)
    pairs = {
        layer: pair._replace(up=0.02 * torch.randn(pair.up.shape, generator=noise))
        for layer, pair in adapter_pairs(source).items()
    }
    put_pairs(transformer, pairs, name)


def test_adapters_of_other_ranks_and_layers_count_together(model: Model) -> None:
    transformer = load(model, exact("nf4"))
    base = drawn(transformer)
    add(transformer, "first", model, Adapter(rank=4, targets="attention+mlp"), 1)
    add(transformer, "second", model, Adapter(rank=3, targets="attention"), 2)
    weights = ({"first": 0.5, "second": -0.3}, {"second": 1.0}, {})
    expected = []
    for chosen in weights:
        set_adapters(transformer, dict(chosen))
        expected.append(drawn(transformer))
    assert torch.equal(expected[-1], base) and error([expected[0]], [expected[1]]) > 1e-3
    for keep in KEEP:
        install(transformer, Memory(keep=keep), CPU)
        for chosen, wanted in zip(weights, expected, strict=True):
            set_adapters(transformer, dict(chosen))
            assert error([drawn(transformer)], [wanted]) < 1e-5, (keep, chosen)


def test_an_adapter_learns_beside_a_recovery_adapter(model: Model) -> None:
    precision = exact("nf4")
    transformer = load(model, precision).train()
    add(transformer, RECOVERY, model, Adapter(rank=8, targets="attention+mlp"), 1)
    parameters: list[Tensor] = list(attach(transformer, Adapter(rank=4), 0))
    expected = step(transformer, parameters, precision)
    alone, _ = make(precision, Adapter(rank=4), model)
    assert error([expected[0]], [step(alone, list(alone.parameters())[:0], precision)[0]]) > 1e-3
    for keep in ("nothing", "attention"):
        install(transformer, Memory(keep=keep), CPU)
        assert error(step(transformer, parameters, precision), expected) < 1e-5


@pytest.mark.parametrize(("keep", "budget"), [("nothing", None), ("attention", 1.0)])
def test_blocks_of_several_kinds_beside_each_other(keep: str, budget: float | None, model: Model) -> None:
    layers = {r"transformer_blocks\.0\..*": "int8", r"single_transformer_blocks\.1\..*": "bf16"}
    precision = exact("nf4", layers=layers)
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    expected = step(transformer, parameters, precision)
    offload = install(transformer, Memory(keep=keep, budget_gib=budget), CPU)
    if offload is not None:
        offload.set_resident(2)
    assert error(step(transformer, parameters, precision), expected) < 1e-5


@pytest.mark.parametrize("keep", ["attention", "everything"])
def test_each_kind_of_block_is_compiled_once(keep: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks keep nothing or their products, test_fast.py counts."""
    compiled: list[str] = []

    def counting(graph: Any, inputs: Any) -> Any:  # traced, and run as it is: what differentiates it is not counted
        compiled.append("graph")
        return graph.forward

    monkeypatch.setattr(fast, "BACKEND", counting)
    torch._dynamo.reset()
    precision = exact("nf4")
    transformer, parameters = make(precision, ADAPTERS["lora"], model)
    install(transformer, Memory(keep=keep, compile=True), CPU)
    for _ in range(2):
        step(transformer, parameters, precision)
    assert len(compiled) == 2


@pytest.mark.parametrize("kind", ["fp32", "int8", "fp4", "nf4", "double"])
def test_a_part_of_a_layers_rows_is_dequantized_as_the_whole(kind: str, klein: Model) -> None:
    precision = exact("nf4", double_quant=True) if kind == "double" else exact(kind)
    transformer, _ = make(precision, ADAPTERS["dora"], klein)
    layers = Group(transformer.single_transformer_blocks[1], "attn.to_qkv_mlp_proj").linear()
    whole, (lora,) = dequantize(layers.frozen, torch.float32), layers.adapters[0]
    rows = len(whole)
    assert lora.magnitude is not None
    for start, end in ((0, 384), (384, rows), (0, rows)):
        assert can_cut(layers.frozen, start)
        part = rows_of(layers, start, end)
        assert torch.equal(dequantize(part.frozen, torch.float32), whole[start:end])
        (cut,) = part.adapters[0]
        assert cut.magnitude is not None
        assert torch.equal(cut.up, lora.up[start:end]) and torch.equal(cut.magnitude, lora.magnitude[start:end])


def test_double_quantized_rows_are_cut_between_blocks_of_scales_alone() -> None:
    empty = torch.empty(0)
    nested = Stack("nf4", (64, 128), (64,), empty, empty, (empty, empty, empty), None)
    assert [can_cut(nested, row) for row in (0, 64, 128, 192, 256)] == [True, False, True, False, True]
    assert can_cut(nested._replace(nested=None), 64)


def test_a_sampler_takes_what_the_pipelines_give(model: Model) -> None:
    """The forward of any family by keywords; on a CPU each call is the first of its form, which is an ordinary one."""
    transformer = load(model, exact("nf4"))
    install(transformer, Memory(), CPU)
    expected = drawn(transformer)
    sampler = Sampler(transformer, None)
    sampler.refresh()
    assert torch.equal(drawn(transformer), expected)
    (form,) = sampler.replay.seen
    assert isinstance(form, tuple)
    given = {name for name, value in form if value is not None}
    assert {"hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids"} <= given
    with pytest.raises(RuntimeError, match="gradients need the plain one"):
        velocity(transformer, torch.Generator(), (1, 8, 8), torch.float32)
    with pytest.raises(AssertionError, match="scales nothing"):
        sampler(joint_attention_kwargs={"scale": 0.5}, hidden_states=torch.ones(1))


def test_an_adapter_in_fp32_does_not_change_what_is_computed_in(model: Model) -> None:
    transformer, _ = make(Precision("nf4"), Adapter(rank=4), model)
    assert transformer.transformer_blocks[0].attn.to_q.lora_A["default"].weight.dtype == torch.float32
    assert compute_dtype_of(transformer) == compute_dtype(torch.bfloat16, CPU)


def test_the_cache_of_reference_tokens_is_refused(klein: Model) -> None:
    transformer = load(klein, Precision("fp32"))
    install(transformer, Memory(), CPU)
    with pytest.raises(AssertionError, match="kv_cache_mode"):
        transformer.transformer_blocks[0](
            hidden_states=torch.ones(1, 4, 128),
            encoder_hidden_states=torch.ones(1, 4, 128),
            temb_mod_img=torch.ones(1, 768),
            temb_mod_txt=torch.ones(1, 768),
            image_rotary_emb=(torch.ones(8, 32), torch.ones(8, 32)),
            joint_attention_kwargs={"kv_cache_mode": "extract"},
        )
    uninstall(transformer)
    assert "forward" not in transformer.transformer_blocks[0].__dict__
