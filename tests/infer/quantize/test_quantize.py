"""Precisions on the bundled model: what is stored, how far it is from the original, and what survives a round trip."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from torch import nn

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.checkpoint.text import load_text_parts
from infer.quantize.precision import KINDS, Precision, check_quantized, kind_of, linear_layers
from infer.quantize.quantizer import LayerQuantizer, held, quantizing_on
from infer.quantize.storage import dequantized, stored_bytes
from infer.save import Save, save
from tests.infer.adapter.test_adapters import inputs

CPU = torch.device("cpu")
TINY = Model("scripts/tiny/model")


def nf4_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """NF4 from its definition (Dettmers et al. 2023, appendix E): blocks of 64 scaled by their absmax, each value
    moved to the nearest of sixteen quantiles of the normal distribution."""
    # fmt: off
    levels = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
    # fmt: on
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


def int8_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """LLM.int8's weights: each row scaled by its absmax to [-127, 127] and rounded (Dettmers et al. 2022)."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round() * scale


def test_weights_are_what_the_papers_say() -> None:
    name = "transformer_blocks.0.attn.to_q"
    original = linear_layers(load_transformer(TINY, Precision("bf16"), CPU))[name].weight.detach()
    nf4 = dequantized(linear_layers(load_transformer(TINY, Precision("nf4"), CPU))[name])
    # bitsandbytes dequantizes to bf16: one rounding of 2^-9
    torch.testing.assert_close(nf4, nf4_by_hand(original), rtol=2**-7, atol=1e-6)
    # and rounds int8 from fp16, where a value may fall to the neighbouring step
    int8 = dequantized(linear_layers(load_transformer(TINY, Precision("int8"), CPU))[name])
    step = original.float().abs().amax(1, keepdim=True) / 127
    assert ((int8 - int8_by_hand(original)).abs() <= 1.01 * step).all()
    assert ((int8 - int8_by_hand(original)).abs() < 0.1 * step).float().mean() > 0.99


HELD = {
    "int8": Precision("int8"),
    "fp4": Precision("fp4"),
    "nf4": Precision("nf4"),
    "nested": Precision("nf4", double_quant=True),
    "mixed": Precision("nf4", layers={r"single_transformer_blocks\..*": "int8", ".*norm.*": "bf16"}),
}


@pytest.mark.parametrize("precision", HELD.values(), ids=HELD)
def test_weights_held_elsewhere_than_they_were_quantized_are_the_same(precision: Precision) -> None:
    # one memory by two names: tensors are moved as from a GPU to the host
    elsewhere = torch.device("cpu", 0)
    assert not isinstance(nn.Parameter(torch.zeros(1)).to(elsewhere), nn.Parameter)
    here, there = (load_transformer(TINY, precision, CPU, hold) for hold in (CPU, elsewhere))
    assert check_quantized(there, precision) == check_quantized(here, precision)
    mine, own = here.state_dict(), there.state_dict()
    assert mine.keys() == own.keys() and all(torch.equal(mine[key], own[key].to(CPU)) for key in mine)
    own_layers = linear_layers(there)
    for name, layer in linear_layers(here).items():
        other = own_layers[name]
        if kind_of(layer) is not None:
            assert type(layer.weight) is type(other.weight) and not other.weight.requires_grad
            assert torch.equal(dequantized(layer), dequantized(other))
        if kind_of(layer) in ("nf4", "fp4"):  # else accelerate's affair
            assert type(other.bias) is nn.Parameter and not other.bias.requires_grad


def test_a_held_weight_keeps_its_class_and_takes_its_constants_along() -> None:
    meta = torch.device("meta")
    for kind in ("int8", "nf4"):
        layer = next(iter(linear_layers(load_transformer(TINY, Precision(kind), CPU)).values()))
        moved = held(layer.weight, meta)
        assert type(moved) is type(layer.weight) and moved.is_meta
        constants = moved.SCB if kind == "int8" else moved.quant_state.absmax
        assert constants.is_meta
        bias = held(layer.bias, meta)
        assert type(bias) is nn.Parameter and bias.is_meta and bias.dtype == layer.bias.dtype


def output(precision: Precision) -> torch.Tensor:
    transformer = load_transformer(TINY, precision, CPU)
    own = torch.Generator().manual_seed(0)
    with torch.no_grad():
        velocity: torch.Tensor = transformer(
            hidden_states=torch.randn(2, 64, 64, generator=own).to(precision.dtype),
            encoder_hidden_states=torch.randn(2, 40, 128, generator=own).to(precision.dtype),
            pooled_projections=torch.randn(2, 128, generator=own).to(precision.dtype),
            timestep=torch.tensor([0.3, 0.8]),
            guidance=torch.ones(2),
            img_ids=torch.zeros(64, 3),
            txt_ids=torch.zeros(40, 3),
            return_dict=False,
        )[0]
    return velocity.float()


def weight_error(kind: str) -> float:
    """||stored - given|| / ||given|| of all linear layers' weights."""
    given, stored = (linear_layers(load_transformer(TINY, Precision(each), CPU)) for each in ("bf16", kind))
    pairs = [(dequantized(stored[name]).float(), layer.weight.float()) for name, layer in given.items()]
    off, whole = (
        sum(float(each.square().sum()) for each in part) for part in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return (off / whole) ** 0.5


def test_errors_are_ordered_and_sizes_fall() -> None:
    exact = output(Precision("fp32", compute_dtype="fp32"))
    error = {kind: float((output(Precision(kind)) - exact).norm() / exact.norm()) for kind in KINDS[1:]}
    # of inputs that it has never seen, which of the 4-bit kinds is nearer is chance; of weights it is not
    assert error["bf16"] < error["int8"] < min(error["nf4"], error["fp4"]), error
    off = {kind: weight_error(kind) for kind in ("int8", "nf4", "fp4")}
    assert off["int8"] < off["nf4"] < off["fp4"], off
    size = {kind: stored_bytes(load_transformer(TINY, Precision(kind), CPU)) for kind in KINDS}
    assert size["fp32"] == 2 * size["bf16"]
    assert size["nf4"] == size["fp4"] < size["int8"] < size["bf16"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "bf16"])
def test_stored_bytes_by_arithmetic(kind: str) -> None:
    shapes = [layer.weight.shape for layer in linear_layers(load_transformer(TINY, Precision("bf16"), CPU)).values()]
    rest = stored_bytes(load_transformer(TINY, Precision("bf16"), CPU)) - sum(2 * a * b for a, b in shapes)
    expected = {
        "bf16": sum(2 * a * b for a, b in shapes),
        "int8": sum(a * b + 4 * a for a, b in shapes),  # a scale in fp32 for each row
        "nf4": sum(a * b // 2 + a * b // 64 * 4 + 16 * 4 for a, b in shapes),  # absmax of 64 values, sixteen levels
    }
    expected["fp4"] = expected["nf4"]
    assert stored_bytes(load_transformer(TINY, Precision(kind), CPU)) == expected[kind] + rest


def test_double_quantization_is_smaller_and_close() -> None:
    plain = load_transformer(TINY, Precision("nf4"), CPU)
    double = load_transformer(TINY, Precision("nf4", double_quant=True), CPU)
    name = "single_transformer_blocks.0.proj_mlp"
    assert stored_bytes(double) < stored_bytes(plain)
    a, b = dequantized(linear_layers(plain)[name]), dequantized(linear_layers(double)[name])
    assert 0 < float((a - b).norm() / a.norm()) < 0.02


def test_skipped_modules_and_wrong_names() -> None:
    kept = load_transformer(TINY, Precision("nf4", skip_modules=["proj_out", "x_embedder"]), CPU)
    kinds = {name: kind_of(layer) for name, layer in linear_layers(kept).items()}
    skipped = [name for name, kind in kinds.items() if kind is None]
    assert skipped == [name for name in kinds if name.split(".")[-1] in ("proj_out", "x_embedder")]
    assert len(skipped) == 6  # four single blocks, the model's own, and the embedder
    with pytest.raises(ValueError, match="skip_modules names 'no_such_layer'"):
        load_transformer(TINY, Precision("nf4", skip_modules=["no_such_layer"]), CPU)


def test_every_layer_is_quantized_and_a_miss_is_an_error() -> None:
    transformer = load_transformer(TINY, Precision("nf4"), CPU)
    assert check_quantized(transformer, Precision("nf4")) == len(linear_layers(transformer)) > 50
    transformer.x_embedder = nn.Linear(64, 256)
    with pytest.raises(ValueError, match=r"1 of .* x_embedder \(not quantized instead of nf4\)"):
        check_quantized(transformer, Precision("nf4"))


@pytest.mark.parametrize("t5", ["same", "bf16", "int8"])
def test_t5_has_its_own_kind(t5: str) -> None:
    parts = load_text_parts(TINY, Precision("nf4", t5=t5), CPU)
    kinds = {
        kind_of(layer) for name, layer in linear_layers(parts["text_encoder_2"]).items() if not name.endswith("wo")
    }
    assert kinds == {{"same": "nf4", "bf16": None, "int8": "int8"}[t5]}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_saved_quantized_checkpoint_loads_as_it_was(kind: str, tmp_path: Path) -> None:
    out = save(Save(TINY, Precision(kind), str(tmp_path / kind), "cpu"))
    again = load_transformer(Model(str(out)), Precision(kind), CPU)
    first = load_transformer(TINY, Precision(kind), CPU)
    assert stored_bytes(again) == stored_bytes(first)
    for name, layer in linear_layers(first).items():
        assert torch.equal(dequantized(layer), dequantized(linear_layers(again)[name])), name
    with pytest.raises(ValueError, match=f"is stored as {kind}, and bf16 is asked for; set precision={kind}"):
        load_transformer(Model(str(out)), Precision("bf16"), CPU)
    with pytest.raises(ValueError, match="does not exist yet"):
        save(Save(TINY, Precision(kind), str(out), "cpu"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_plain_diffusers_loads_what_was_saved(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By diffusers' own quantizers, which this module's loads leave in their places."""
    out = save(Save(TINY, Precision(kind), str(tmp_path / kind), "cpu")) / "transformer"
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes" and stored["load_in_8bit"] is (kind == "int8")
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is BnB4BitDiffusersQuantizer
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is BnB8BitDiffusersQuantizer
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):  # which ask for a GPU
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, **kwargs: None)
    plain = FluxTransformer2DModel.from_pretrained(out, device_map={"": CPU}, torch_dtype=torch.bfloat16)
    assert type(plain.hf_quantizer) in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer)
    ours = linear_layers(load_transformer(TINY, Precision(kind), CPU))
    for name, layer in linear_layers(plain).items():
        assert kind_of(layer) == kind and torch.equal(dequantized(layer), dequantized(ours[name])), name


@pytest.mark.parametrize("precision", [Precision("nf4"), Precision("int8"), HELD["mixed"]], ids=str)
def test_one_quantizer_reads_every_kind_and_is_registered_only_meanwhile(precision: Precision) -> None:
    before = dict(AUTO_QUANTIZER_MAPPING)
    transformer = load_transformer(TINY, precision, CPU)
    assert type(transformer.hf_quantizer) is LayerQuantizer
    assert transformer.hf_quantizer.is_serializable is not bool(precision.layers)
    with pytest.raises(KeyError), quantizing_on(CPU, CPU):
        assert AUTO_QUANTIZER_MAPPING.keys() == before.keys() | {"bitsandbytes_mixed"}
        raise KeyError
    assert before == AUTO_QUANTIZER_MAPPING


def test_wrong_device() -> None:
    with pytest.raises(ValueError, match="need a CUDA device or a CPU, not meta"):
        load_transformer(TINY, Precision("nf4"), torch.device("meta"))


def test_llm_int8_keeps_its_scales_beside_dora() -> None:
    """PEFT reads the weights of such a layer at each step, and on a CPU makes them anew."""
    transformer = load_transformer(TINY, Precision("int8", llm_int8=True, outlier_threshold=4.0), CPU)
    given = inputs(transformer.dtype)
    with torch.no_grad():
        base = transformer(**given)[0].float()
        attach(transformer, Adapter(rank=2, dora=True), seed=0)
        first, second = (transformer(**given)[0].float() for _ in range(2))
    assert torch.equal(first, second)  # without the scales there was no second one
    assert (first - base).norm() < 0.02 * base.norm()  # B is 0, and the magnitudes are the weights' own
