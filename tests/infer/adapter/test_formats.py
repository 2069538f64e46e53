"""LoRA files of every program, against diffusers' own conversion of whole checkpoints, plain diffusers and PEFT."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import adapter_state, save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.read import read_notes, read_pairs
from infer.adapter.write import FORMATS
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.convert import Convert, Source, convert
from infer.family import flux1
from infer.family.find import of_model
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from tests.infer.adapter.test_adapters import inputs, klein_inputs, randomise

CPU = torch.device("cpu")
FP32 = Precision("fp32", compute_dtype="fp32")
WIDTH, RANK = 256, 6
BLOCKS = {
    "double_blocks": {
        "img_attn.qkv": (3, 1), "txt_attn.qkv": (3, 1), "img_attn.proj": (1, 1), "txt_attn.proj": (1, 1),
        "img_mlp.0": (4, 1), "img_mlp.2": (1, 4), "txt_mlp.0": (4, 1), "txt_mlp.2": (1, 4),
        "img_mod.lin": (6, 1), "txt_mod.lin": (6, 1),
    },
    "single_blocks": {"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)},
}  # fmt: skip
REST = {
    "img_in": (256, 64), "txt_in": (256, 128), "final_layer.linear": (64, 256),
    "final_layer.adaLN_modulation.1": (512, 256), "vector_in.in_layer": (256, 128), "vector_in.out_layer": (256, 256),
    **{f"{name}_in.{part}_layer": (256, 256) for name in ("time", "guidance") for part in ("in", "out")},
}  # fmt: skip
NORMS = {
    "double_blocks": [f"{kind}_attn.norm.{qk}_norm.scale" for kind in ("img", "txt") for qk in ("query", "key")],
    "single_blocks": ["norm.query_norm.scale", "norm.key_norm.scale"],
}
Inputs = dict[str, Any]


def small(seed: int) -> Callable[..., Tensor]:
    own = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=own) / shape[-1] ** 0.5


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """A random FLUX.1 of the bundled model's size under Black Forest Labs' names."""
    draw, state = small(0), {}
    shapes = dict(REST)
    for kind, count in (("double_blocks", 2), ("single_blocks", 4)):
        for i in range(count):
            shapes |= {f"{kind}.{i}.{n}": (a * WIDTH, b * WIDTH) for n, (a, b) in BLOCKS[kind].items()}
            state |= {f"{kind}.{i}.{name}": torch.ones(64) for name in NORMS[kind]}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": draw(*shape), f"{name}.bias": 0.1 * draw(shape[0])}
    return state


def transformer_of(checkpoint: dict[str, Tensor]) -> FluxTransformer2DModel:
    """Made by diffusers' own conversion, which knows one width alone: it is told this one."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), names)
    transformer = load_transformer(Model("scripts/tiny/model"), FP32, CPU)
    transformer.load_state_dict(names["convert_flux_transformer_checkpoint_to_diffusers"](dict(checkpoint)))
    return transformer


def velocity(transformer: Any) -> Tensor:
    given = inputs() if of_model(transformer) is flux1 else klein_inputs()
    with torch.no_grad():
        out: Tensor = transformer(**given)[0]
    return out


def theirs(style: str, checkpoint: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA file over every layer in the style's keys, and the checkpoint that it means, by the program's formula."""
    draw, state, merged = small(1), {}, dict(checkpoint)
    for name in [key.removesuffix(".weight") for key in checkpoint if key.endswith(".weight")]:
        weight = checkpoint[f"{name}.weight"]
        down, up = draw(RANK, weight.shape[1]), draw(weight.shape[0], RANK)
        strength = 1.0
        if style == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            alpha = torch.tensor(2.5 if "qkv" in name else 9.0)
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
            strength = float(alpha) / RANK
        elif style == "comfyui":
            state |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        elif style == "bfl":
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        merged[f"{name}.weight"] = weight + strength * (up @ down)
    return state, merged


@pytest.mark.parametrize("style", ["kohya", "comfyui", "bfl"])
def test_fused_layers_of_others(style: str, checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    state, merged = theirs(style, checkpoint)
    save_file(state, tmp_path / "theirs.safetensors")
    base = transformer_of(checkpoint)
    plain, expected = velocity(base), velocity(transformer_of(merged))
    assert load_adapter(base, str(tmp_path / "theirs.safetensors"), "mine") == 2 * 14 + 4 * 6 + 10
    assert (expected - plain).norm() > 0.1 * plain.norm()
    assert (velocity(base) - expected).norm() < 1e-4 * (expected - plain).norm()


class Made(NamedTuple):
    """An adapter over every layer with a strength of its own."""

    model: Model
    folder: Path
    base: Tensor  # velocity without it
    expected: Tensor  # velocity with it


@pytest.fixture(scope="module", params=["tiny", "klein"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    model, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp("adapter")
    transformer = load_transformer(model, FP32, CPU)
    base = velocity(transformer)
    attach(transformer, Adapter(rank=4, alpha=6, rslora=True, targets="all"), seed=0)
    randomise(transformer)
    save_adapter(transformer.eval(), folder, {"trigger": "zelk"})
    return Made(model, folder, base, velocity(transformer))


@pytest.mark.parametrize("form", FORMATS)
def test_round_trips_draw_the_same(form: str, trained: Made, tmp_path: Path) -> None:
    model, folder, base, expected = trained
    out = tmp_path / ("folder" if form == "peft" else "one.safetensors")
    written = convert(Convert(Source(str(folder)), form, str(out)))
    transformer = load_transformer(model, FP32, CPU)
    load_adapter(transformer, str(written), "mine")
    assert (velocity(transformer) - expected).norm() < 1e-4 * (expected - base).norm()
    again = convert(Convert(Source(str(written)), "diffusers", str(tmp_path / "again")))
    assert read_notes(again) == {"trigger": "zelk"}
    first, second = read_pairs(str(folder)), read_pairs(str(again))
    assert first.keys() == second.keys()
    for layer, pair in first.items():
        assert pair.down.shape == second[layer].down.shape, layer  # no rank has grown on the way
        update = second[layer].strength * second[layer].up @ second[layer].down
        torch.testing.assert_close(update, pair.strength * pair.up @ pair.down, rtol=1e-5, atol=1e-6)


def test_peft_reads_what_is_written_for_it(trained: Made, tmp_path: Path) -> None:
    model, folder, base, expected = trained
    convert(Convert(Source(str(folder)), "peft", str(tmp_path / "peft")))
    loaded = PeftModel.from_pretrained(load_transformer(model, FP32, CPU), tmp_path / "peft")
    assert (velocity(loaded.base_model.model.eval()) - expected).norm() < 1e-4 * (expected - base).norm()


def test_a_part_of_a_fused_layer_stays_a_part(tmp_path: Path) -> None:
    """Only k, and only the MLP half of linear1, at two ranks: kohya's file adapts nothing else."""
    draw = small(3)
    state = {}
    for layer, rows, rank in (("attn.to_k", WIDTH, 2), ("proj_mlp", 4 * WIDTH, 3)):
        key = f"transformer.single_transformer_blocks.1.{layer}"
        state |= {f"{key}.lora_A.weight": draw(rank, WIDTH), f"{key}.lora_B.weight": draw(rows, rank)}
    save_file(state, tmp_path / "own.safetensors")
    file = convert(Convert(Source(str(tmp_path / "own.safetensors")), "kohya", str(tmp_path / "kohya.safetensors")))
    written = load_file(file)
    assert written["lora_unet_single_blocks_1_linear1.lora_up.weight"].shape == (7 * WIDTH, 5)
    assert float(written["lora_unet_single_blocks_1_linear1.alpha"]) == 5
    back = read_pairs(str(file))
    assert {layer: pair.down.shape[0] for layer, pair in back.items()} == {
        "single_transformer_blocks.1.attn.to_k": 2, "single_transformer_blocks.1.proj_mlp": 3
    }  # fmt: skip


def test_plain_diffusers_reads_kohya_and_comfyui_at_full_width(tmp_path: Path) -> None:
    """Its conversion splits linear1 at FLUX.1-dev's width alone: there it must mean what ours does."""
    draw, state = small(4), {}
    for layer, rows in (("attn.to_q", 3072), ("attn.to_v", 3072), ("proj_mlp", 12288)):
        key = f"transformer.single_transformer_blocks.7.{layer}"
        state |= {f"{key}.lora_A.weight": draw(2, 3072), f"{key}.lora_B.weight": draw(rows, 2)}
    for layer in ("to_q", "to_k", "to_v"):
        key = f"transformer.transformer_blocks.3.attn.{layer}"
        state |= {f"{key}.lora_A.weight": draw(2, 3072), f"{key}.lora_B.weight": draw(3072, 2)}
    save_file(state, tmp_path / "own.safetensors")
    x = draw(3072)
    for form in ("kohya", "comfyui"):
        file = convert(Convert(Source(str(tmp_path / "own.safetensors")), form, str(tmp_path / f"{form}.safetensors")))
        read = FluxPipeline.lora_state_dict(str(file))
        for layer in {key.split(".lora_")[0] for key in read}:
            found = read[f"{layer}.lora_B.weight"] @ (read[f"{layer}.lora_A.weight"] @ x)
            up, down = state.get(f"{layer}.lora_B.weight"), state.get(f"{layer}.lora_A.weight")
            expected = torch.zeros_like(found) if up is None or down is None else up @ (down @ x)
            torch.testing.assert_close(found, expected)


def test_xlabs_and_old_diffusers_keys_as_plain_diffusers_reads_them(tmp_path: Path) -> None:
    draw = small(5)
    xlabs, old = {}, {}
    for i, kinds in (("double_blocks.1.processor", ("1", "2")), ("single_blocks.2.processor", ("",))):
        for kind in kinds:
            wide = WIDTH if kind else 5 * WIDTH
            xlabs |= {f"{i}.qkv_lora{kind}.down.weight": draw(4, WIDTH), f"{i}.qkv_lora{kind}.up.weight": draw(768, 4)}
            xlabs |= {f"{i}.proj_lora{kind}.down.weight": draw(4, wide), f"{i}.proj_lora{kind}.up.weight": draw(256, 4)}
    for layer, alpha in (("transformer_blocks.0.attn.to_out.0", 3.0), ("single_transformer_blocks.3.attn.to_v", 5.0)):
        key = f"transformer.{layer}"
        old |= {f"{key}.lora.down.weight": draw(4, WIDTH), f"{key}.lora.up.weight": draw(WIDTH, 4)}
        old[f"{key}.alpha"] = torch.tensor(alpha)
    for state in (xlabs, old):
        save_file(state, tmp_path / "theirs.safetensors")
        pipeline = FluxPipeline.from_pretrained("scripts/tiny/model", torch_dtype=torch.float32)
        base = velocity(pipeline.transformer)
        pipeline.load_lora_weights(tmp_path / "theirs.safetensors")
        expected = velocity(pipeline.transformer)
        transformer = load_transformer(Model("scripts/tiny/model"), FP32, CPU)
        load_adapter(transformer, str(tmp_path / "theirs.safetensors"), "mine")
        assert (expected - base).norm() > 0.01 * base.norm()
        assert (velocity(transformer) - expected).norm() < 1e-4 * (expected - base).norm()


def test_a_run_goes_on_from_any_file(trained: Made, tmp_path: Path) -> None:
    model, folder, base, expected = trained
    file = convert(Convert(Source(str(folder)), "kohya", str(tmp_path / "kohya.safetensors")))
    for adapter in (
        Adapter(rank=4, alpha=3, targets="all", start=str(file)),
        Adapter(rank=7, alpha=14, targets="all", start=str(folder)),
    ):
        transformer = load_transformer(model, FP32, CPU)
        parameters = attach(transformer, adapter, seed=0)
        assert all(parameter.requires_grad for parameter in parameters)
        assert {state.shape[0] for key, state in adapter_state(transformer).items() if "_A." in key} == {adapter.rank}
        assert (velocity(transformer.eval()) - expected).norm() < 1e-4 * (expected - base).norm()
    for adapter, message in (
        (Adapter(rank=3, targets="all", start=str(folder)), r"rank 4; set adapter\.rank=4 or more"),
        (Adapter(rank=4, start=str(folder)), r"adapts \d+ layers that adapter\.targets=attention does not"),
        (Adapter(rank=4, targets="all", dora=True, start=str(folder)), r"is LoRA; set adapter\.dora to it"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(load_transformer(model, FP32, CPU), adapter, seed=0)


KEY = "transformer.transformer_blocks.0.attn.to_q"
GOOD = {f"{KEY}.lora_A.weight": torch.ones(2, WIDTH), f"{KEY}.lora_B.weight": torch.ones(WIDTH, 2)}
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "half": ({f"{KEY}.lora_A.weight": torch.ones(2, WIDTH)}, "has A but no B for transformer_blocks.0.attn.to_q"),
    "other half": ({f"{KEY}.lora_B.weight": torch.ones(WIDTH, 2)}, "has B but no A for"),
    "ranks": (GOOD | {f"{KEY}.lora_A.weight": torch.ones(3, WIDTH)}, r"A \(3, 256\) and B \(256, 2\) .*no pair of one"),
    "unknown": (GOOD | {f"{KEY}x.lora_A.weight": torch.ones(2, 2)}, r"1 of 3 keys are unknown \(transformer.*to_qx"),
    "empty": ({}, "holds no tensor: it was saved empty"),
    "lokr": ({"lora_unet_double_blocks_0_img_mlp_0.lokr_w1": torch.ones(2, 2)}, "has no lokr_w2_a for double_blocks"),
    "loha": (
        {f"lora_unet_double_blocks_0_img_mlp_0.hada_w{i}_{j}": torch.ones(2 + (j == "b" and i == 2), 2)
         for i in (1, 2) for j in "ab"}, "do not fit each other",
    ),
    "alpha of several": (
        {"lora_unet_double_blocks_0_img_mlp_0.lokr_w1": torch.ones(2, 2),
         "lora_unet_double_blocks_0_img_mlp_0.lokr_w2_a": torch.ones(64, 2),
         "lora_unet_double_blocks_0_img_mlp_0.lokr_w2_b": torch.ones(2, 16),
         "lora_unet_double_blocks_0_img_mlp_0.alpha": torch.ones(3)}, r"alpha of the shape \[3\] in lora_unet_do"),
    "lokr of full rank": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(120, 40),
         "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": torch.ones(30, 30)},
        "an update of a rank above 1024 to double_blocks_0_img_attn_qkv, which diffusers has as 3 layers",
    ),
    "tucker": ({"lora_unet_double_blocks_0_img_mlp_0.hada_t1": torch.ones(2, 2)}, "three factors .LyCORIS' Tucker"),
    "control": (GOOD | {f"{KEY}.lora_B.bias": torch.ones(WIDTH)}, "biases of its own, as FLUX.1's Canny and Depth"),
    "dora by columns": (GOOD | {f"{KEY}.dora_scale": torch.ones(1, WIDTH)}, r"shape \[1, 256\] is not one of rows"),
    "dora of no axis": (GOOD | {f"{KEY}.dora_scale": torch.ones(WIDTH)}, r"magnitude over outputs"),
    "infinite": (GOOD | {f"{KEY}.alpha": torch.tensor(torch.inf)}, "is not finite in 1 tensors"),
    "zero": (GOOD | {f"{KEY}.lora_A.weight": torch.zeros(2, WIDTH)}, "is zero in every layer"),
    "text": (GOOD | {"lora_te1_text_model_fc1.lora_up.weight": torch.ones(2, 2)}, "adapts the text encoder too"),
    "twice": (
        GOOD | {key.replace("transformer.t", "base_model.model.t"): value for key, value in GOOD.items()},
        "says twice what|strength stands in adapter_config.json",
    ),
    "qkv": (
        {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 64),
         "double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(100, 2)}, "B has 100 rows for 64 features",
    ),
    "peft alone": (
        {key.replace("transformer.t", "base_model.model.t"): value for key, value in GOOD.items()},
        "strength stands in adapter_config.json; put that file beside it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_refused(how: str, tmp_path: Path) -> None:
    state, message = BROKEN[how]
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=message):
        read_pairs(str(tmp_path / "broken.safetensors"))


def test_strengths_that_disagree_and_patterns(tmp_path: Path) -> None:
    config = {"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn.to_q": 5}}
    header = {"lora_adapter_metadata": json.dumps(config)}
    other = {key.replace("to_q", "to_k"): value.clone() for key, value in GOOD.items()}
    save_file(GOOD | other, tmp_path / "own.safetensors", metadata=header)
    pairs = read_pairs(str(tmp_path / "own.safetensors"))
    assert {layer.split(".")[-1]: pair.strength for layer, pair in pairs.items()} == {"to_q": 2.5, "to_k": 3.0}
    save_file(GOOD | {f"{KEY}.alpha": torch.tensor(4.0)}, tmp_path / "own.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"two strengths, 2\.0 and 2\.5"):
        read_pairs(str(tmp_path / "own.safetensors"))


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr tall", "lokr of factors", "lokr whole"])
def test_loha_and_lokr_add_what_their_definition_says(kind: str, tmp_path: Path) -> None:
    """A fused q, k, v [768, 256]; the reference multiplies as LyCORIS does, number by number and by torch.kron."""
    numbers = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    if kind == "loha":
        parts = {"hada_w1_a": drawn(768, 3), "hada_w1_b": drawn(3, 256),
                 "hada_w2_a": drawn(768, 3), "hada_w2_b": drawn(3, 256)}  # fmt: skip
        delta = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) * (6 / 3)
    else:
        rows, columns = (8, 4) if kind == "lokr tall" else (4, 8)
        parts, scale = {"lokr_w1": drawn(rows, columns)}, 6 / 2
        inner = 768 // rows, 256 // columns
        if kind == "lokr whole":
            parts["lokr_w2"], scale = drawn(*inner), 1.0
        else:
            parts |= {"lokr_w2_a": drawn(inner[0], 2), "lokr_w2_b": drawn(2, inner[1])}
        if kind == "lokr of factors":
            del parts["lokr_w1"]
            parts |= {"lokr_w1_a": drawn(rows, 5), "lokr_w1_b": drawn(5, columns)}
        w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        w2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        delta = scale * torch.stack([w1[i // inner[0]][:, None] * w2[i % inner[0]] for i in range(768)]).flatten(1)
        assert torch.allclose(delta, scale * torch.kron(w1, w2))
    name = "lycoris_double_blocks_0_img_attn_qkv"
    state = {f"{name}.{key}": value for key, value in (parts | {"alpha": torch.tensor(6.0)}).items()}
    save_file(state, tmp_path / "theirs.safetensors")
    pairs = read_pairs(str(tmp_path / "theirs.safetensors"))
    assert list(pairs) == [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    found = torch.cat([pair.strength * pair.up @ pair.down for pair in pairs.values()])
    torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-4)
    out = convert(
        Convert(Source(str(tmp_path / "theirs.safetensors")), "diffusers", str(tmp_path / "lora.safetensors"))
    )
    written = read_pairs(str(out))
    again = torch.cat([written[layer].strength * written[layer].up @ written[layer].down for layer in pairs])
    torch.testing.assert_close(again, delta, rtol=1e-4, atol=1e-4)


def test_dora_of_lycoris_draws_as_its_formula_says(tmp_path: Path) -> None:
    """A fused q, k, v under kohya's names with dora_scale [out, 1], against m (W + s B A) / |W + s B A| by rows."""
    transformer = load_transformer(Model(str(ROOT / "scripts/tiny/model")), FP32, CPU)
    numbers = torch.Generator().manual_seed(0)
    block = transformer.transformer_blocks[0].attn
    layers = [block.to_q, block.to_k, block.to_v]
    own = torch.cat([layer.weight.data for layer in layers]).clone()
    down, up = (0.1 * torch.randn(shape, generator=numbers) for shape in ((4, own.shape[1]), (own.shape[0], 4)))
    scale = own.norm(dim=1, keepdim=True) * (0.5 + torch.rand(own.shape[0], 1, generator=numbers))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    values = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": scale}
    save_file({f"{name}.{key}": value for key, value in values.items()}, tmp_path / "theirs.safetensors")
    given = inputs()
    with torch.no_grad():
        base = transformer(**given)[0]
        changed = own + 2.0 / 4 * up @ down
        changed *= scale / changed.norm(dim=1, keepdim=True)
        for layer, part in zip(layers, changed.chunk(3), strict=True):
            layer.weight.data = part.contiguous()
        expected = transformer(**given)[0]
        for layer, part in zip(layers, own.chunk(3), strict=True):
            layer.weight.data = part.contiguous()
        load_adapter(transformer, str(tmp_path / "theirs.safetensors"), "theirs")
        found = transformer(**given)[0]
    assert float((expected - base).norm()) > 0.01 * float(base.norm())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    dora = GOOD | {f"{KEY}.lora_magnitude_vector": torch.ones(WIDTH)}
    save_file(dora, tmp_path / "dora.safetensors")
    source = str(tmp_path / "dora.safetensors")
    for options, message in (
        (Convert(Source(source), "comfyui", str(tmp_path / "k.safetensors")), "comfyui files hold no DoRA"),
        (Convert(Source(source), "kohya", str(tmp_path / "k.safetensors")), "the magnitude of its rows is not known"),
        (Convert(Source(source), "kohya", str(tmp_path / "k")), r"to=kohya writes a file named \*.safetensors"),
        (Convert(Source(source), "peft", str(tmp_path / "k.safetensors")), "to=peft writes a folder"),
        (Convert(Source(source), "diffusers", source), "give a file or folder that does not exist yet"),
        (Convert(Source(""), "diffusers", str(tmp_path / "k")), "adapter.path is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(options)
    text = GOOD | {"lora_te1_text_model_fc1.lora_up.weight": torch.ones(2, 2)}
    save_file(text, tmp_path / "text.safetensors")
    out = str(tmp_path / "kept.safetensors")
    convert(Convert(Source(str(tmp_path / "text.safetensors")), "diffusers", out, drop_text_encoder=True))
    assert load_file(out).keys() == GOOD.keys()
    assert not list(tmp_path.glob("k*.partial")) and not (tmp_path / "k").exists()
