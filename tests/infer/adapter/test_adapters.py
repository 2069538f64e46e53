"""Adapters: gradients, strength, and the file that plain diffusers reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from infer.adapter.attach import attach, load_adapter, shapes_of
from infer.adapter.attached import adapter_state, save_adapter, strengths, update_norm
from infer.adapter.lora import Adapter
from infer.adapter.read import FILE, read_notes
from infer.adapter.switch import switch
from infer.adapter.targets import PRESETS, match_targets
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.quantize.precision import Precision, linear_layers
from infer.quantize.storage import dequantized

CPU = torch.device("cpu")
TINY = Model("scripts/tiny/model")


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    own = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=own).to(dtype),
        "encoder_hidden_states": torch.randn(1, 40, 128, generator=own).to(dtype),
        "pooled_projections": torch.randn(1, 128, generator=own).to(dtype),
        "timestep": torch.tensor([0.6]),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(40, 3),
        "return_dict": False,
    }


def klein_inputs() -> dict[str, Any]:
    """Of tests/tiny_klein.py."""
    own = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=own),
        "encoder_hidden_states": torch.randn(1, 24, 192, generator=own),
        "timestep": torch.tensor([0.6]),
        "guidance": None,
        "img_ids": torch.zeros(16, 4),
        "txt_ids": torch.zeros(24, 4),
        "return_dict": False,
    }


def randomise(transformer: nn.Module, seed: int = 1) -> None:
    """Give every trainable tensor a value: B starts at zero, where half of all mistakes cannot be seen."""
    own = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=own)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_gradients_equal_autograd_on_dequantized_weights(kind: str) -> None:
    """The adapter's gradients through bitsandbytes' layers against plain fp32 layers with the same weights."""
    # threshold 0.0 would multiply int8 by int8; the outlier path with a threshold under every activation is exact
    given = {"outlier_threshold": 1e-6} if kind == "int8" else {}
    precision = Precision(kind, compute_dtype="fp32", **given)
    quantized = load_transformer(TINY, precision, CPU).train()
    plain = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU).train()
    for name, layer in linear_layers(plain).items():
        layer.weight.data = dequantized(linear_layers(quantized)[name])
    adapter = Adapter(rank=4, alpha=8, targets="attention+mlp")
    for transformer in (quantized, plain):
        attach(transformer, adapter, seed=3)
        randomise(transformer)
        velocity = transformer(**inputs())[0].float()
        velocity.square().mean().backward()
    other = dict(plain.named_parameters())
    compared = 0
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and other[name].grad is not None
            relative = (parameter.grad - other[name].grad).norm() / other[name].grad.norm()
            # int8 multiplies in fp16
            assert relative < (2e-2 if kind == "int8" else 1e-4), (name, float(relative))
            compared += 1
    assert compared == 2 * len(
        match_targets(shapes_of(load_transformer(TINY, Precision("bf16"), CPU)), "attention+mlp")
    )


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(rank=4, alpha=10, targets="attention"),
        Adapter(rank=16, alpha=3, rslora=True, targets="attention+mlp"),
        Adapter(rank=8, alpha=4, dora=True, targets="double"),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_saved_adapter_draws_the_same_in_plain_diffusers(adapter: Adapter, tmp_path: Path) -> None:
    transformer = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU)
    with torch.no_grad():
        base = transformer(**inputs())[0]
    attach(transformer, adapter, seed=0)
    randomise(transformer)
    transformer.eval()
    with torch.no_grad():
        trained = transformer(**inputs())[0]
    save_adapter(transformer, tmp_path, {"trigger": "zelk"})
    assert read_notes(tmp_path / FILE) == {"trigger": "zelk"}

    pipeline = FluxPipeline.from_pretrained(TINY.path, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        theirs = pipeline.transformer(**inputs())[0]
    assert (trained - base).norm() > 0.03 * base.norm()
    assert (theirs - trained).norm() < 1e-4 * (trained - base).norm()

    ours = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU)
    expected = len(match_targets(shapes_of(ours), adapter.targets))
    assert load_adapter(ours, str(tmp_path), "mine") == expected
    with torch.no_grad():
        assert (ours(**inputs())[0] - trained).norm() < 1e-4 * (trained - base).norm()
        switch(ours, False)
        assert torch.equal(ours(**inputs())[0], base)
        switch(ours, True)
        assert not torch.equal(ours(**inputs())[0], base)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_an_adapter_loaded_after_pictures_were_drawn(kind: str, tmp_path: Path) -> None:
    """bitsandbytes would repack weights at the first forward pass on some CPUs, and break what comes after."""
    source = load_transformer(TINY, Precision(kind), CPU)
    attach(source, Adapter(rank=4, alpha=6, targets="attention+mlp"), seed=0)
    randomise(source)
    save_adapter(source, tmp_path, {})
    early, late = load_transformer(TINY, Precision(kind), CPU), load_transformer(TINY, Precision(kind), CPU)
    with torch.no_grad():
        base = late(**inputs(torch.bfloat16))[0]
        for transformer in (early, late):
            load_adapter(transformer, str(tmp_path), "mine")
        assert torch.equal(early(**inputs(torch.bfloat16))[0], late(**inputs(torch.bfloat16))[0])
        switch(late, False)
        assert torch.equal(late(**inputs(torch.bfloat16))[0], base)
    with pytest.raises(ValueError, match="there is an adapter 'mine' already"):
        load_adapter(late, str(tmp_path), "mine")


def test_another_programs_strength_is_kept(tmp_path: Path) -> None:
    """A file that diffusers itself saved, with its alpha in the metadata, draws what plain diffusers draws."""
    source = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU)
    attach(source, Adapter(rank=4, alpha=16), seed=0)
    randomise(source)
    state = {key: value.contiguous() for key, value in adapter_state(source).items()}
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata={
            "r": 4,
            "lora_alpha": 16,
            "target_modules": [k.split(".lora_")[0] for k in state],
        },
    )
    ours = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU)
    load_adapter(ours, str(tmp_path), "mine")
    assert set(strengths(ours, "mine").values()) == {4.0}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs())[0], source.eval()(**inputs())[0], rtol=1e-4, atol=1e-5)


def test_a_name_is_a_whole_name() -> None:
    """The model's own proj_out, and not the proj_out of every single block."""
    transformer = load_transformer(TINY, Precision("nf4"), CPU)
    attach(transformer, Adapter(rank=4, targets="proj_out"), seed=0)
    assert list(strengths(transformer)) == ["proj_out"]


def test_strength_and_norm_by_forming_the_products() -> None:
    transformer = load_transformer(TINY, Precision("nf4"), CPU)
    attach(transformer, Adapter(rank=9, alpha=6, rslora=True, targets=r".*\.attn\.to_q"), seed=0)
    assert set(strengths(transformer).values()) == {6 / 3}
    assert update_norm(transformer) == 0
    randomise(transformer)
    state = adapter_state(transformer)
    total = 0.0
    for key, up in state.items():
        if "lora_B" in key:
            total += float((2 * up @ state[key.replace("lora_B", "lora_A")]).square().sum())
    assert update_norm(transformer) == pytest.approx(total**0.5, rel=1e-5)


def test_adapters_are_fp32_frozen_base_and_seeded() -> None:
    states = []
    for seed in (1, 1, 2):
        transformer = load_transformer(TINY, Precision("nf4"), CPU)
        parameters = attach(transformer, Adapter(init="gaussian"), seed=seed)
        assert {p.dtype for p in parameters} == {torch.float32}
        assert {n for n, p in transformer.named_parameters() if p.requires_grad} == {
            n for n, _ in transformer.named_parameters() if "lora_" in n
        }
        states.append(adapter_state(transformer))
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_presets_by_counting() -> None:
    transformer = load_transformer(TINY, Precision("nf4"), CPU)
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    counted = {name: len(match_targets(shapes_of(transformer), name)) for name in PRESETS}
    assert counted == {
        "attention": 8 * double + 3 * single,
        "attention+mlp": 12 * double + 5 * single,
        "double": 12 * double,
        "single": 5 * single,
        "all": len(linear_layers(transformer)),
    }
    assert match_targets(shapes_of(transformer), r"single_transformer_blocks\.1\.proj_mlp") == [
        "single_transformer_blocks.1.proj_mlp"
    ]
    with pytest.raises(ValueError, match=r"'to_q' matches no linear layer.*single_transformer_blocks\.\*\.attn\.to_q"):
        match_targets(shapes_of(transformer), "to_q")


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = next(key for key in state if ".lora_B." in key)
    if how == "not finite":
        state[first][0, 0] = torch.nan
    elif how == "zero in every layer":
        state = {key: torch.zeros_like(value) if ".lora_B." in key else value for key, value in state.items()}
    elif how == "unknown":
        for key in (first, first.replace(".lora_B.", ".lora_A.")):
            state[key.replace("blocks.0", "blocks.77")] = state.pop(key)
    elif how == "does not fit":
        state[first] = torch.randn(96, state[first].shape[1])
    return state


@pytest.mark.parametrize("how", ["not finite", "zero in every layer", "unknown", "does not fit"])
def test_wrong_adapters_are_refused(how: str, tmp_path: Path) -> None:
    source = load_transformer(TINY, Precision("bf16"), CPU)
    attach(source, Adapter(rank=4), seed=0)
    randomise(source)
    save_adapter(source, tmp_path, {})
    save_file(broken(load_file(tmp_path / FILE), how), tmp_path / FILE)
    with pytest.raises(ValueError, match=how):
        load_adapter(load_transformer(TINY, Precision("bf16"), CPU), str(tmp_path), "mine")


def test_absent_and_unreadable_adapters_are_refused(tmp_path: Path) -> None:
    transformer = load_transformer(TINY, Precision("bf16"), CPU)
    with pytest.raises(ValueError, match="there is no adapter at"):
        load_adapter(transformer, str(tmp_path / "absent"), "mine")
    (tmp_path / FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no LoRA file that can be read"):
        load_adapter(transformer, str(tmp_path), "mine")


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    transformer = load_transformer(TINY, Precision("bf16"), CPU)
    for parameter in attach(transformer, Adapter(rank=4), seed=0)[:1]:
        parameter.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(transformer, tmp_path, {})
    assert not list(tmp_path.iterdir())
