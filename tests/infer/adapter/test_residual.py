"""Adapters that start from the quantization error, and recovery adapters, against plain linear algebra."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from infer.adapter.attach import attach, began, load_adapter, load_recovery, remove_adapter
from infer.adapter.attached import adapter_state, save_adapter, strengths
from infer.adapter.error_init import save_start, start_from_error
from infer.adapter.lora import RECOVERY, Adapter
from infer.adapter.selection import Trained, load_chosen
from infer.adapter.switch import switch
from infer.adapter.targets import base_layers
from infer.checkpoint.load import load_transformer
from infer.checkpoint.originals import Originals, transformer_from_shards
from infer.fast.install import Memory, choose_path
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision, kind_asked
from infer.quantize.storage import dequantized
from infer.recover import recover
from infer.rounding.lowrank import allot, approximate
from infer.rounding.settings import Recover
from infer.sample.generate import Sampling
from tests.infer.adapter.test_adapters import TINY, inputs, randomise

CPU = torch.device("cpu")
NF4 = Precision("nf4", compute_dtype="fp32")
TARGETS = r"single_transformer_blocks\.\d+\.(proj_out|attn\.to_q)"


def distances(transformer: torch.nn.Module, layers: list[str]) -> dict[str, float]:
    """||Q + strength x B A - W|| / ||W||."""
    own, found = Originals(TINY), {}
    scale, state = strengths(transformer), adapter_state(transformer)
    for name in layers:
        update = scale[name] * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        exact = own.weight(name)
        found[name] = float((dequantized(base_layers(transformer)[name]) + update - exact).norm() / exact.norm())
    return found


STORED = {
    "nf4": NF4,
    "double": replace(NF4, double_quant=True),
    "mixture": replace(NF4, layers={r".*\.0\.proj_out": "int8", r".*\.0\.attn\.to_q": "bf16", ".*to_q": "fp4"}),
    "skipped": Precision("int8", compute_dtype="fp32", skip_modules=["single_transformer_blocks.0"]),
}
FP32 = Precision("fp32", compute_dtype="fp32")


@pytest.mark.parametrize(
    ("init", "stored", "fused"),
    [
        ("residual", "nf4", True),
        ("residual", "mixture", False),
        ("loftq", "nf4", False),
        ("loftq", "double", True),
        ("loftq", "mixture", True),
        ("loftq", "skipped", True),
    ],
)
def test_starts_near_the_unquantized_weights_and_is_found_again(
    init: str, stored: str, fused: bool, tmp_path: Path
) -> None:
    """In training on it, in a run that goes on from it, and loaded: where layers are stored as in training, and
    elsewhere, where what it has learned is left alone. With and without the fast path, which stacks the weights."""
    precision = STORED[stored]
    transformer = load_transformer(TINY, precision, CPU)
    loaded = {name: dequantized(layer) for name, layer in base_layers(transformer).items()}
    adapter = Adapter(rank=8, alpha=4, targets=TARGETS, init=init)
    attach(transformer, adapter, seed=0)
    layers = list(strengths(transformer))
    plain = distances(transformer, layers)
    expected = {}
    for name in layers:  # the smallest distance that any rank 8 reaches from this Q: what is left of the spectrum
        exact = Originals(TINY).weight(name)
        left = torch.linalg.svdvals(exact - dequantized(base_layers(transformer)[name]))[8:]
        expected[name] = float(left.norm() / exact.norm())
    start = start_from_error(transformer, TINY, init)
    found = distances(transformer, layers)
    quantized = [name for name in layers if kind_asked(precision, name)]
    assert start.here.keys() == set(quantized) and 0 < len(quantized) <= len(layers)
    assert (len(quantized) < len(layers)) == (stored in ("mixture", "skipped"))
    for name in layers:
        if name not in quantized:
            assert found[name] == plain[name]  # no error, and B is zero
            continue
        assert found[name] < plain[name]
        if init == "residual":
            assert found[name] == pytest.approx(expected[name], rel=1e-3)
    if init == "loftq":
        assert sum(found.values()) < sum(expected.values())
    randomise(transformer)
    notes = {"adapter": {"init": init}, "precision": vars(precision)}
    save_start(start.here, tmp_path)
    save_adapter(transformer.eval(), tmp_path, notes)
    with torch.no_grad():
        wanted = transformer(**inputs())[0]

    def here() -> FluxTransformer2DModel:
        one = load_transformer(TINY, precision, CPU)
        if fused:
            choose_path(one, Memory(keep="everything"), precision, CPU, print)
        return one

    again, on = here(), load_transformer(TINY, precision, CPU)
    load_adapter(again, str(tmp_path), "mine", TINY)
    attach(on, Adapter(rank=8, targets=TARGETS, start=str(tmp_path)), seed=1, model=TINY)
    assert began(on)["default"].here.keys() == start.here.keys()
    with torch.no_grad():
        for one in (again, on):
            torch.testing.assert_close(one(**inputs())[0], wanted, rtol=1e-4, atol=1e-5)
    remove_adapter(again, "mine", TINY)
    for name, layer in base_layers(again).items():
        assert torch.equal(dequantized(layer), loaded[name]), name
    with torch.no_grad():
        base = again(**inputs())[0]
        torch.testing.assert_close(base, here()(**inputs())[0], rtol=0, atol=0)

    # what it has learned, without what it started with
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    updates = {}
    for name in layers:
        updates[name] = state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]
        if name in start.here:
            updates[name] -= start.here[name].up @ start.here[name].down
    exact = load_transformer(TINY, FP32, CPU)
    learned = {name: layer.weight.data + updates[name] for name, layer in base_layers(exact).items() if name in layers}
    load_adapter(exact, str(tmp_path), "mine")
    twice = load_transformer(TINY, FP32, CPU)
    attach(twice, Adapter(rank=16, targets=TARGETS, start=str(tmp_path)), seed=0)
    assert not began(twice)
    by_hand = load_transformer(TINY, FP32, CPU)
    for name, weight in learned.items():
        base_layers(by_hand)[name].weight.data = weight
    with torch.no_grad():
        for one in (exact, twice):
            torch.testing.assert_close(one(**inputs())[0], by_hand(**inputs())[0], rtol=1e-4, atol=1e-5)

    # half of it, or beside what makes up for the error already: what it has learned, on the base as it was loaded
    half, beside = here(), load_transformer(TINY, precision, CPU)
    load_chosen(half, Trained(str(tmp_path), weight=0.5), TINY)
    attach(beside, Adapter(rank=2, targets="proj_out"), seed=0, name=RECOVERY)  # B is zero
    load_adapter(beside, str(tmp_path), "mine", TINY)
    for one, weight in ((half, 0.5), (beside, 1.0)):
        by_hand = load_transformer(TINY, FP32, CPU)
        for name, layer in base_layers(by_hand).items():
            layer.weight.data = loaded[name] + weight * updates.get(name, 0)
        with torch.no_grad():
            torch.testing.assert_close(one(**inputs())[0], by_hand(**inputs())[0], rtol=1e-3, atol=1e-4)
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(ValueError, match=r"needs start\.safetensors beside it; copy its whole folder"):
        load_adapter(load_transformer(TINY, NF4, CPU), str(tmp_path), "mine", TINY)


def test_error_starts_that_cannot_be() -> None:
    layers = {"proj_out": "bf16"}
    for precision in (FP32, replace(NF4, layers=layers), Precision("nf4", skip_modules=["proj_out"])):
        transformer = load_transformer(TINY, precision, CPU)
        attach(transformer, Adapter(rank=4, targets="proj_out", init="residual"), seed=0)
        with pytest.raises(ValueError, match=r"none of the layers that adapter\.targets names is quantized"):
            start_from_error(transformer, TINY, "residual")


def test_low_rank_is_the_best_there_is() -> None:
    """Against SVD between square roots of both Gram matrices (Eckart and Young), and against plain SVD."""
    own = torch.Generator().manual_seed(0)
    error, scale = torch.randn(24, 40, generator=own), torch.logspace(0, -3, 40)
    inputs, gradients = torch.randn(500, 40, generator=own) * scale, torch.randn(300, 24, generator=own)
    gradients[:, :5] *= 10
    found = approximate(error, inputs, gradients, most=6, tokens=500)
    left, right = (torch.linalg.qr(rows, mode="r").R for rows in (gradients, inputs))
    spectrum = torch.linalg.svdvals(left @ error @ right.T)
    for rank in (1, 3, 6):
        rest = gradients @ (error - found.up[:, :rank] @ found.down[:rank]) @ inputs.T
        assert float(rest.norm()) == pytest.approx(float(spectrum[rank:].norm()), rel=0.03)
    u, s, v = torch.linalg.svd(error)
    plain = gradients @ (error - u[:, :6] * s[:6] @ v[:6]) @ inputs.T
    assert float(plain.norm()) > 2 * float(rest.norm())
    assert (found.gains.diff() <= 0).all()


def test_ranks_go_where_a_byte_gains_most() -> None:
    gains = {"a": torch.tensor([9.0, 1.0]), "b": torch.tensor([8.0, 6.0, 1.0]), "c": torch.tensor([0.0])}
    assert allot(gains, {"a": 10, "b": 2, "c": 1}, 14) == {"b": 2, "a": 1}
    assert allot(gains, {"a": 10, "b": 2, "c": 1}, 9) == {"b": 3}


def test_the_streamed_transformer_is_the_loaded_one() -> None:
    dtype = compute_dtype(torch.bfloat16, CPU)
    loaded, streamed = load_transformer(TINY, Precision("bf16"), CPU), transformer_from_shards(TINY, CPU, dtype)
    assert all(parameter.is_meta for parameter in streamed.parameters())
    with torch.no_grad():
        for seed in (0, 1):
            assert torch.equal(streamed(**inputs(dtype, seed))[0], loaded(**inputs(dtype, seed))[0])
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_a_recovery_adapter_closes_the_gap_and_stays_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts and steps; the figures of docs/adapters.md come from the whole command."""
    monkeypatch.chdir(tmp_path)
    tiny = replace(TINY, path=str(Path(__file__).parents[3] / TINY.path))
    nf4 = Precision("nf4")
    prompts = ["a red star on a sky background", "two blue circles on a cream background", "three green hearts"]
    options = Recover(
        tiny, nf4, Sampling(steps=3), prompts, ["a purple ring"], rows=300, most=48, polish=2, device="cpu"
    )
    folder = recover(options)
    figures = json.loads((tmp_path / "runs" / "recover" / "recovery.json").read_text())
    assert 0.04 < figures["share"] <= 0.05
    assert figures["relative_velocity_error_after"] < 0.8 * figures["relative_velocity_error_before"]
    transformer, exact = load_transformer(tiny, nf4, CPU), load_transformer(tiny, Precision("bf16"), CPU)
    given = inputs(torch.bfloat16)
    with torch.no_grad():
        wanted, before = exact(**given)[0].float(), transformer(**given)[0].float()
        load_recovery(transformer, str(folder), tiny, nf4)
        after = transformer(**given)[0].float()
        assert (after - wanted).norm() < (before - wanted).norm()
        trained = attach(transformer, Adapter(rank=4), seed=0)
        assert {p for p in transformer.parameters() if p.requires_grad} == set(trained)
        torch.testing.assert_close(transformer(**given)[0].float(), after)  # B is zero
        randomise(transformer)
        both = transformer(**given)[0].float()
        assert not torch.equal(both, after)
        switch(transformer, False)
        torch.testing.assert_close(transformer(**given)[0].float(), after)
        switch(transformer, True)
        torch.testing.assert_close(transformer(**given)[0].float(), both)
        assert {p for p in transformer.parameters() if p.requires_grad} == set(trained)
    assert RECOVERY in transformer.peft_config
    save_adapter(transformer, tmp_path / "own", {})
    assert all("attn" in key for key in load_file(tmp_path / "own" / "pytorch_lora_weights.safetensors"))  # apart
    for precision, path, message in (
        (replace(nf4, layers={".*ff.*": "int8"}), folder, r"another mixture: .*\.ff.* was nf4 and is int8, as one of"),
        (replace(nf4, skip_modules=["proj_out"]), folder, r"another mixture: .*proj_out was nf4 and is not quantized"),
        (replace(nf4, double_quant=True), folder, "was made for double_quant=False, not True"),
        (Precision("fp4"), folder, "was made for kind=nf4, not fp4; make one with"),
        (nf4, tmp_path / "own", "is no recovery adapter; make one with"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recovery(transformer, str(path), tiny, precision)
    with pytest.raises(ValueError, match="is a recovery adapter, which belongs to quantized weights"):
        Trained(str(folder)).all()
    with pytest.raises(ValueError, match="exists; choose another name with run="):
        recover(options)
    with pytest.raises(ValueError, match="precision is bf16, which loses nothing; choose nf4"):
        recover(replace(options, precision=Precision("bf16")))
