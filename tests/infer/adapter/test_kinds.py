"""LoKr, LoHa and OFT: what PEFT's own layers, LyCORIS' formulas and merged weights give."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTRotationModule
from safetensors.torch import load_file, save_file

from infer.adapter.attach import attach, load_adapter, remove_adapter
from infer.adapter.attached import adapter_state, save_adapter, set_adapter_state, strengths, update_norm
from infer.adapter.convert import convert_file
from infer.adapter.factors import Factors
from infer.adapter.fit import fitting_adapter
from infer.adapter.lora import Adapter
from infer.adapter.read import FILE, Pair, read_adapter, read_pairs
from infer.adapter.sizes import factors, tensor_sizes
from infer.adapter.switch import set_adapters, without_adapter
from infer.adapter.tuner import factors_of
from infer.adapter.write import write_pairs
from infer.checkpoint.load import load_transformer
from infer.family.family import Linear
from infer.merging.update import Factored, merged
from infer.quantize.precision import Precision
from infer.quantize.storage import dequantized
from tests.infer.adapter.test_adapters import CPU, TINY, inputs, randomise

TARGETS = r"(single_)?transformer_blocks\.[01]\.(attn\.to_[qk]|proj_out|ff\.net\.2)"
KINDS = {
    "lokr": Adapter(8, 4.0, kind="lokr", factor=4, targets=TARGETS),
    "lokr whole": Adapter(512, 256.0, kind="lokr", factor=2, targets=TARGETS),
    "loha": Adapter(4, 2.0, kind="loha", targets=TARGETS),
    "oft": Adapter(kind="oft", block=8, targets=TARGETS),
}


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A transformer in fp32 with an adapter that does something, and that adapter's folder."""
    transformer = load_transformer(TINY, Precision("fp32"), CPU)
    attach(transformer, KINDS[request.param], seed=0)
    randomise(transformer)
    folder = tmp_path_factory.mktemp("kinds")
    save_adapter(transformer, folder, {})
    yield transformer, folder


def velocity(transformer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = transformer(**inputs(torch.float32))[0]
    return found


def dense(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with a file's update, by LyCORIS' and OneTrainer's formulas, layer by layer."""
    state, found = load_file(folder / FILE), dict(weights)
    for layer, weight in weights.items():
        key = f"lycoris_{layer.replace('.', '_')}"
        own = {name.removeprefix(f"{key}."): value for name, value in state.items() if name.startswith(f"{key}.")}
        turn = state.get(f"transformer.{layer}.oft_R.weight")
        if turn is not None:
            module = OFTRotationModule(*turn.shape, 8, weight.shape[1])
            module.weight.data = turn
            found[layer] = weight @ module.get_weight().detach().T
        elif "hada_w1_a" in own:
            one, two = (own[f"hada_w{i}_a"] @ own[f"hada_w{i}_b"] for i in (1, 2))
            found[layer] = weight + own["alpha"] / own["hada_w1_b"].shape[0] * one * two
        elif own:
            whole = "lokr_w2" in own
            w2 = own["lokr_w2"] if whole else own["lokr_w2_a"] @ own["lokr_w2_b"]
            scale = 1.0 if whole else own["alpha"] / own["lokr_w2_b"].shape[0]
            w1 = own["lokr_w1"]
            rows, columns = w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]
            found[layer] = weight + scale * torch.einsum("ac,bd->abcd", w1, w2).reshape(rows, columns)
    return found


def test_a_layer_computes_what_pefts_own_does(trained: tuple[Any, Path]) -> None:
    """On weights that are not packed, which PEFT's own layers can read."""
    transformer, _ = trained
    for layer in strengths(transformer):
        module = transformer.get_submodule(layer)
        x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = type(module).forward(module, x)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, module.base_layer(x), atol=1e-3)


def test_a_file_means_what_lycoris_and_onetrainer_say(trained: tuple[Any, Path]) -> None:
    """The velocity with the adapter on is that of dense weights that were made from the file's own names."""
    transformer, folder = trained
    plain = load_transformer(TINY, Precision("fp32"), CPU)
    layers = {layer: plain.get_submodule(layer) for layer in strengths(transformer)}
    weights = dense(folder, {layer: module.weight.data for layer, module in layers.items()})
    for layer, module in layers.items():
        assert not torch.equal(module.weight.data, weights[layer])
        module.weight.data = weights[layer]
    torch.testing.assert_close(velocity(transformer), velocity(plain), rtol=1e-3, atol=1e-4)
    loaded = load_transformer(TINY, Precision("fp32"), CPU)
    base = velocity(loaded)
    assert load_adapter(loaded, str(folder), "mine") == len(layers)
    torch.testing.assert_close(velocity(loaded), velocity(plain), rtol=1e-3, atol=1e-4)
    set_adapters(loaded, {})
    assert torch.equal(velocity(loaded), base)
    set_adapters(loaded, {"mine": 1.0})
    torch.testing.assert_close(velocity(loaded), velocity(plain), rtol=1e-3, atol=1e-4)
    remove_adapter(loaded, "mine", TINY)
    assert torch.equal(velocity(loaded), base)


def test_merged_weights_are_the_dense_ones(trained: tuple[Any, Path]) -> None:
    transformer, folder = trained
    own = load_transformer(TINY, Precision("fp32"), CPU)
    weights = {layer: own.get_submodule(layer).weight.data for layer in strengths(transformer)}
    found, expected = read_adapter(str(folder)), dense(folder, weights)
    for layer, weight in weights.items():
        if isinstance(found, Factors):
            part: Any = Factored(found.layers[layer], found.strengths[layer])
        else:
            part = found[layer]
        torch.testing.assert_close(merged(weight, [(part, 1.0)]), expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "precision", [Precision("nf4"), Precision("fp4"), Precision("int8"), Precision("nf4", double_quant=True)]
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_quantized_layers_learn(kind: str, precision: Precision, tmp_path: Path) -> None:
    """Nothing changes before the first step; all factors get gradients; a layer is its dequantized weight with the
    update; the state goes back where it was."""
    transformer = load_transformer(TINY, replace(precision, compute_dtype="fp32"), CPU)
    before = velocity(transformer)
    parameters = attach(transformer, KINDS[kind], seed=0)
    assert torch.equal(velocity(transformer), before)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in parameters)
    randomise(transformer)
    transformer(**inputs(torch.float32))[0].square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
    with without_adapter(transformer):
        assert torch.equal(velocity(transformer), before)
    layer, module = "transformer_blocks.0.attn.to_q", transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, module.in_features)
    saved = adapter_state(transformer)
    folder = save_adapter(transformer, tmp_path, {}).parent
    weight = dense(folder, {layer: dequantized(module.base_layer).float()})[layer]
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight, module.base_layer.bias.float())
        torch.testing.assert_close(module(x), expected, rtol=0.02, atol=0.05 * float(expected.std()))
    for parameter in parameters:
        parameter.data.zero_()
    set_adapter_state(transformer, saved)
    assert all(torch.equal(saved[key], value) for key, value in adapter_state(transformer).items())
    assert update_norm(transformer) > 0


def test_the_norm_is_that_of_the_dense_update(trained: tuple[Any, Path]) -> None:
    transformer, folder = trained
    weights = {layer: transformer.get_submodule(layer).base_layer.weight.data for layer in strengths(transformer)}
    turned = "oft_R.weight" in next(iter(load_file(folder / FILE)))
    if turned:  # R - I itself: what it does to a weight of ones on the diagonal
        weights = {layer: torch.eye(weight.shape[1]) for layer, weight in weights.items()}
    after = dense(folder, weights)
    total = sum(float((after[layer] - weight).square().sum()) for layer, weight in weights.items())
    assert update_norm(transformer) == pytest.approx(total**0.5, rel=1e-3)


@pytest.mark.parametrize("kind", ["lokr", "loha", "oft"])
def test_an_adapter_goes_on_from_one_of_its_kind(kind: str, tmp_path: Path) -> None:
    first = load_transformer(TINY, Precision("fp32"), CPU)
    attach(first, KINDS[kind], seed=0)
    randomise(first)
    save_adapter(first, tmp_path, {})
    again = load_transformer(TINY, Precision("fp32"), CPU)
    attach(again, replace(KINDS[kind], start=str(tmp_path)), seed=5)
    torch.testing.assert_close(velocity(again), velocity(first), rtol=1e-4, atol=1e-5)
    changes = {"lokr": {"factor": 2}, "loha": {"rank": 2}, "oft": {"block": 16}}[kind]
    other = replace(KINDS[kind], start=str(tmp_path), **changes)
    with pytest.raises(ValueError, match="has other sizes at"):
        attach(load_transformer(TINY, Precision("fp32"), CPU), other, seed=0)
    with pytest.raises(ValueError, match=f"set adapter={kind}"):
        wrong = Adapter(kind="loha" if kind != "loha" else "lokr", targets=TARGETS, start=str(tmp_path))
        attach(load_transformer(TINY, Precision("fp32"), CPU), wrong, seed=0)


def test_it_goes_on_from_a_checkpoint_at_its_strength(tmp_path: Path) -> None:
    first = load_transformer(TINY, Precision("fp32"), CPU)
    settings = replace(KINDS["loha"], alpha=3.0 * KINDS["loha"].rank)
    attach(first, settings, seed=0)
    randomise(first)
    folder = tmp_path / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    file = folder / "adapter.safetensors"
    save_file(adapter_state(first), file)
    (folder / "state.json").write_text(
        json.dumps({"sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}})
    )
    (tmp_path / "config.yaml").write_text(json.dumps({"adapter": asdict(settings)}))
    again = load_transformer(TINY, Precision("fp32"), CPU)
    attach(again, replace(settings, start=str(folder)), seed=5)
    torch.testing.assert_close(velocity(again), velocity(first), rtol=1e-4, atol=1e-5)


def test_a_lokr_of_full_rank_is_read_by_its_own_factors(tmp_path: Path) -> None:
    """SimpleTuner's usual one, which as LoRA would have the layer's whole rank."""
    plain = load_transformer(TINY, Precision("fp32"), CPU)
    names = ("single_transformer_blocks.0.proj_mlp", "transformer_blocks.1.attn.to_v")
    layers = {name: tuple(plain.get_submodule(name).weight.shape) for name in names}
    own = torch.Generator().manual_seed(3)
    state = {}
    for layer, (rows, columns) in layers.items():
        key = f"lycoris_{layer.replace('.', '_')}"
        state[f"{key}.lokr_w1"] = 0.1 * torch.randn(4, 4, generator=own)
        state[f"{key}.lokr_w2"] = 0.1 * torch.randn(rows // 4, columns // 4, generator=own)
        state[f"{key}.alpha"] = torch.tensor(10000.0)  # means nothing where both factors are whole
    save_file(state, tmp_path / "full.safetensors")
    for layer in layers:
        key = f"lycoris_{layer.replace('.', '_')}"
        plain.get_submodule(layer).weight.data += torch.kron(state[f"{key}.lokr_w1"], state[f"{key}.lokr_w2"])
    loaded = load_transformer(TINY, Precision("fp32"), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infer.adapter.read.MOST", 64)
        load_adapter(loaded, str(tmp_path / "full.safetensors"), "full")
        assert type(loaded.transformer_blocks[1].attn.to_v).__module__.endswith("lokr.layer")
        torch.testing.assert_close(velocity(loaded), velocity(plain), rtol=1e-3, atol=1e-4)
        set_adapters(loaded, {"full": 0.5})
        half = velocity(loaded)
        with pytest.raises(ValueError, match="no other adapter can be beside it"):
            load_adapter(loaded, str(tmp_path / "full.safetensors"), "second")
    assert not torch.allclose(half, velocity(plain), atol=1e-3)


def test_pefts_own_folder_says_the_strength(tmp_path: Path) -> None:
    """Of LoKr in PEFT's names: alpha / r of its configuration, where the file says nothing."""
    layer = "transformer_blocks.1.attn.to_v"
    parts = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(32, 2), "lokr_w2_b": torch.ones(2, 32)}
    save_file(
        {f"base_model.model.{layer}.{part}": v for part, v in parts.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"stands in adapter_config\.json; put that file beside it"):
        read_pairs(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 2, "alpha": 6}))
    pair = read_pairs(str(tmp_path))[layer]
    assert torch.equal(pair.strength * pair.up @ pair.down, torch.full((128, 128), 6.0))


def test_lycoris_names_are_written_and_read_again(trained: tuple[Any, Path], tmp_path: Path) -> None:
    transformer, folder = trained
    out = tmp_path / "out.safetensors"
    if transformer.peft_config["default"].__class__ is OFTConfig:
        for form, said in (
            ("lycoris", "LyCORIS' OFT is of outputs"),
            ("diffusers", "cannot be written as LoRA; merge"),
        ):
            with pytest.raises(ValueError, match=said):
                convert_file(str(folder), form, out, False)
        return
    convert_file(str(folder), "lycoris", out, False)
    before, after = load_file(folder / FILE), load_file(out)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)
    convert_file(str(folder), "diffusers", out, False)
    own = load_transformer(TINY, Precision("fp32"), CPU)
    load_adapter(own, str(out), "whole")
    torch.testing.assert_close(velocity(own), velocity(transformer), rtol=1e-3, atol=1e-4)


def test_unfitting_files_are_named(trained: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = trained
    state = load_file(folder / FILE)
    with pytest.raises(ValueError, match="does not fit this model"):
        fitting_adapter(str(folder), {"transformer_blocks.0.attn.to_q": Linear(1, 1)})
    first = min(key for key in state if not key.endswith("alpha"))
    save_file(state | {first: torch.full_like(state[first], torch.inf)}, tmp_path / "inf.safetensors")
    with pytest.raises(ValueError, match="is not finite in 1 tensors"):
        read_adapter(str(tmp_path / "inf.safetensors"))
    save_file({key: torch.zeros_like(value) for key, value in state.items()}, tmp_path / "zero.safetensors")
    with pytest.raises(ValueError, match="is zero in every layer"):
        read_adapter(str(tmp_path / "zero.safetensors"))


def dora_pairs() -> dict[str, Any]:
    """DoRA of the three layers that are one in kohya's names, of a layer apart, and of the one whose halves turn."""
    own = torch.Generator().manual_seed(7)
    layers = {f"transformer_blocks.0.attn.to_{name}": (128, 128) for name in "qkv"}
    layers |= {"transformer_blocks.0.attn.to_out.0": (128, 128), "norm_out.linear": (256, 128)}
    return {
        layer: Pair(torch.randn(4, columns, generator=own), torch.randn(rows, 4, generator=own), 0.5,
                    torch.rand(rows, generator=own) + 0.5)
        for layer, (rows, columns) in layers.items()
    }  # fmt: skip


@pytest.mark.parametrize("form", ["kohya", "lycoris", "diffusers"])
def test_dora_is_written_with_its_magnitude(form: str, tmp_path: Path) -> None:
    """kohya's and LyCORIS' dora_scale [out, 1], of fused layers the parts behind each other."""
    pairs, weight = dora_pairs(), torch.randn(256, 128, generator=torch.Generator().manual_seed(8))
    file = write_pairs(pairs, form, tmp_path / "dora.safetensors", {})
    state, again = load_file(file), read_pairs(str(file))
    if form == "kohya":
        scale = state["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"]
        assert scale.shape == (384, 1)
        assert torch.equal(
            scale.flatten(), torch.cat([pairs[f"transformer_blocks.0.attn.to_{n}"].magnitude for n in "qkv"])
        )
    assert again.keys() == pairs.keys()
    for layer, pair in pairs.items():
        own = weight[: pair.up.shape[0]]
        expected, found = merged(own, [(pair, 1.0)]), merged(own, [(again[layer], 1.0)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dora_of_a_part_of_a_fused_layer_has_no_kohya_names(tmp_path: Path) -> None:
    pairs = {layer: pair for layer, pair in dora_pairs().items() if not layer.endswith("to_k")}
    with pytest.raises(ValueError, match=r"img_attn\.qkv holds .*to_k too, .*use to=lycoris"):
        write_pairs(pairs, "kohya", tmp_path / "dora.safetensors", {})
    with pytest.raises(ValueError, match="ComfyUI divides a row by"):
        write_pairs(pairs, "comfyui", tmp_path / "dora.safetensors", {})


def test_sizes_are_those_that_peft_makes(trained: tuple[Any, Path]) -> None:
    transformer, _ = trained
    config = transformer.peft_config["default"]
    kind = {"lokr": "lokr" if config.r == 8 else "lokr whole"} if config.peft_type == "LOKR" else {}
    adapter = KINDS[kind.get("lokr", config.peft_type.lower())]
    for layer, parts in factors_of(transformer).layers.items():
        module = transformer.get_submodule(layer)
        found = tensor_sizes(adapter, Linear(module.out_features, module.in_features))
        assert sorted(found) == sorted(value.numel() for value in parts.values())


@pytest.mark.parametrize("side", [64, 127, 360, 3072, 12288, 15360, 18432])
@pytest.mark.parametrize("factor", [-1, 1, 4, 7, 16])
def test_sides_are_cut_as_peft_cuts_them(side: int, factor: int) -> None:
    assert factors(side, factor) == factorization(side, factor)


def test_an_adapter_named_for_blocks_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\.block is 48, which does not divide the \d+ features that"):
        attach(load_transformer(TINY, Precision("fp32"), CPU), Adapter(kind="oft", block=48), seed=0)


def test_another_cayley_transform_is_refused(tmp_path: Path) -> None:
    layer = "transformer_blocks.1.attn.to_v"
    state = {f"base_model.model.{layer}.oft_R.weight": 0.1 * torch.ones(4, 496)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    for changes in ({"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 7}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "r": 0} | changes))
        with pytest.raises(ValueError, match="another form of Cayley's transform"):
            read_adapter(str(tmp_path))


def test_two_kinds_on_one_layer_are_refused(trained: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = trained
    key = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{key}.lora_A.weight": torch.ones(2, 256), f"{key}.lora_B.weight": torch.ones(256, 2)}
    save_file(load_file(folder / FILE) | pair, tmp_path / "both.safetensors")
    with pytest.raises(
        ValueError, match=r"has LoRA and OFT for transformer_blocks|says twice what transformer_blocks|in one; save the"
    ):
        read_adapter(str(tmp_path / "both.safetensors"))
