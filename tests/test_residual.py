"""Adapters that start from the quantization error, and recovery adapters, against plain linear algebra."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infer.adapters import (
    RECOVERY,
    Adapter,
    attach,
    load_adapter,
    load_recovery,
    save_adapter,
    strengths,
    switch,
)
from infer.attached import adapter_state
from infer.flux import load_transformer
from infer.generate import Sampling
from infer.lowrank import allot, approximate
from infer.originals import Originals, streamed_transformer
from infer.quantize import Precision, dequantized
from infer.recover import Recover, recover
from infer.residual import save_start, start_from_error
from infer.several import Trained
from infer.targets import base_layers
from tests.test_adapters import TINY, inputs, randomise

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


@pytest.mark.parametrize("init", ["residual", "loftq"])
def test_starts_near_the_unquantized_weights_and_is_found_again(init: str, tmp_path: Path) -> None:
    transformer = load_transformer(TINY, NF4, CPU)
    adapter = Adapter(rank=8, alpha=4, targets=TARGETS, init=init)
    attach(transformer, adapter, seed=0)
    layers = list(strengths(transformer))
    plain = distances(transformer, layers)
    expected = {}
    for name in layers:  # the smallest distance that any rank 8 reaches from this Q: what is left of the spectrum
        exact = Originals(TINY).weight(name)
        left = torch.linalg.svdvals(exact - dequantized(base_layers(transformer)[name]))[8:]
        expected[name] = float(left.norm() / exact.norm())
    start = start_from_error(transformer, TINY, NF4, init)
    found = distances(transformer, layers)
    for name in layers:
        assert found[name] < plain[name]
        if init == "residual":
            assert found[name] == pytest.approx(expected[name], rel=1e-3)
    if init == "loftq":
        assert sum(found.values()) < sum(expected.values())
    randomise(transformer)
    notes = {"adapter": {"init": init}, "precision": vars(NF4)}
    save_start(start, tmp_path)
    save_adapter(transformer.eval(), tmp_path, notes)

    again = load_transformer(TINY, NF4, CPU)
    load_adapter(again, str(tmp_path), "mine", TINY)
    with pytest.raises(ValueError, match=r"makes up for quantization itself .*leave the recovery adapter out"):
        both = load_transformer(TINY, NF4, CPU)
        attach(both, Adapter(rank=2, targets="proj_out"), seed=0, name=RECOVERY)
        load_adapter(both, str(tmp_path), "mine", TINY)
    exact = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU)
    learned = {name: layer.weight.data.clone() for name, layer in base_layers(exact).items() if name in layers}
    load_adapter(exact, str(tmp_path), "mine")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs())[0], transformer(**inputs())[0], rtol=1e-4, atol=1e-5)
        state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        by_hand = load_transformer(TINY, Precision("fp32", compute_dtype="fp32"), CPU)
        for name, weight in learned.items():  # what was learned, without what it started with
            key = f"transformer.{name}.lora"
            update = state[f"{key}_B.weight"] @ state[f"{key}_A.weight"] - start[name].up @ start[name].down
            base_layers(by_hand)[name].weight.data = weight + update
        torch.testing.assert_close(exact(**inputs())[0], by_hand(**inputs())[0], rtol=1e-4, atol=1e-5)
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(ValueError, match=r"needs start\.safetensors beside it; copy its whole folder"):
        load_adapter(load_transformer(TINY, NF4, CPU), str(tmp_path), "mine", TINY)


def test_error_starts_that_cannot_be() -> None:
    for precision, init, message in (
        (
            Precision("fp32", compute_dtype="fp32"),
            "residual",
            "starts from a quantization error, but precision is fp32",
        ),
        (replace(NF4, double_quant=True), "loftq", "which precision.double_quant does not allow"),
    ):
        transformer = load_transformer(TINY, precision, CPU)
        attach(transformer, Adapter(rank=4, targets="proj_out", init=init), seed=0)
        with pytest.raises(ValueError, match=message):
            start_from_error(transformer, TINY, precision, init)


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
    loaded, streamed = load_transformer(TINY, Precision("bf16"), CPU), streamed_transformer(TINY, CPU, torch.bfloat16)
    assert all(parameter.is_meta for parameter in streamed.parameters())
    with torch.no_grad():
        for seed in (0, 1):
            assert torch.equal(streamed(**inputs(torch.bfloat16, seed))[0], loaded(**inputs(torch.bfloat16, seed))[0])
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_a_recovery_adapter_closes_the_gap_and_stays_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts and steps; the figures of docs/adapters.md come from the whole command."""
    monkeypatch.chdir(tmp_path)
    tiny = replace(TINY, path=str(Path(__file__).parents[1] / TINY.path))
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
