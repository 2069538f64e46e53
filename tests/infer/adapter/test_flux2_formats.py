"""LoRA files of FLUX.2, against diffusers' conversion of whole checkpoints, its pipeline's own loader and formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import save_adapter
from infer.adapter.file_family import file_family
from infer.adapter.fit import fitting_pairs
from infer.adapter.layer_names import layers_of, original_name
from infer.adapter.lora import Adapter
from infer.adapter.read import PEFT_FILE, read_pairs
from infer.adapter.strengths import PEFT_CONFIG
from infer.adapter.write import FORMATS
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.convert import Convert, Source, convert
from infer.family import flux1, flux2
from infer.family.family import Linear
from infer.family.flux2_sizes import KLEIN
from infer.quantize.precision import Precision
from tests.infer.adapter.test_adapters import randomise
from tests.infer.adapter.test_formats import FP32, small, velocity

CPU = torch.device("cpu")
WIDTH, RANK = 128, 6  # of tests/tiny_klein.py
BLOCKS = {
    "double_blocks": {
        "img_attn.qkv": (3, 1), "txt_attn.qkv": (3, 1), "img_attn.proj": (1, 1), "txt_attn.proj": (1, 1),
        "img_mlp.0": (6, 1), "img_mlp.2": (1, 3), "txt_mlp.0": (6, 1), "txt_mlp.2": (1, 3),
    },
    "single_blocks": {"linear1": (9, 1), "linear2": (1, 4)},
}  # fmt: skip
REST = {
    "img_in": (128, 64), "txt_in": (128, 192), "time_in.in_layer": (128, 256), "time_in.out_layer": (128, 128),
    "double_stream_modulation_img.lin": (768, 128), "double_stream_modulation_txt.lin": (768, 128),
    "single_stream_modulation.lin": (384, 128), "final_layer.adaLN_modulation.1": (256, 128),
    "final_layer.linear": (64, 128),
}  # fmt: skip
COUNTS = {"double_blocks": 2, "single_blocks": 4}
LAYERS = 2 * 12 + 4 * 2 + len(REST)
NORMS = {
    "double_blocks": [f"{kind}_attn.norm.{qk}_norm.scale" for kind in ("img", "txt") for qk in ("query", "key")],
    "single_blocks": ["norm.query_norm.scale", "norm.key_norm.scale"],
}


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """A random klein of the tiny one's size under Black Forest Labs' names."""
    draw, state, shapes = small(0), {}, dict(REST)
    for kind, layers in BLOCKS.items():
        for i in range(COUNTS[kind]):
            shapes |= {f"{kind}.{i}.{name}": (a * WIDTH, b * WIDTH) for name, (a, b) in layers.items()}
            state |= {f"{kind}.{i}.{name}": torch.ones(32) for name in NORMS[kind]}
    return state | {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}


def transformer_of(klein: Model, checkpoint: dict[str, Tensor]) -> Any:
    transformer = load_transformer(klein, FP32, CPU)
    transformer.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(dict(checkpoint)))
    return transformer


STYLES = {  # the name's prefix, how it stands, the ends of A and B, and whether an alpha is given
    "kohya, musubi-tuner": ("lora_unet_", "_", "lora_down.weight", "lora_up.weight", True),
    "ComfyUI": ("diffusion_model.", ".", "lora_down.weight", "lora_up.weight", True),
    "ai-toolkit": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight", False),
    "SimpleTuner": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight", True),
    "converted by musubi-tuner": ("diffusion_model.", "_attn", "lora_A.weight", "lora_B.weight", False),
    "OneTrainer": ("", ".", "lora_down.weight", "lora_up.weight", True),
    "PEFT": ("base_model.model.", ".", "lora_A.weight", "lora_B.weight", False),
    "DoRA": ("base_model.model.", ".", "lora_A.weight", "lora_B.weight", False),
}


@pytest.mark.parametrize("style", STYLES)
def test_files_of_others_mean_the_checkpoint_with_their_update(
    style: str, checkpoint: dict[str, Tensor], klein: Model, tmp_path: Path
) -> None:
    prefix, joint, down, up, alphas = STYLES[style]
    draw, state, merged = small(1), {}, dict(checkpoint)
    for name in [key.removesuffix(".weight") for key in checkpoint if key.endswith(".weight")]:
        weight = checkpoint[f"{name}.weight"]
        a, b = draw(RANK, weight.shape[1]), draw(weight.shape[0], RANK)
        key = prefix + (name.replace("_attn.", "_attn_") if joint == "_attn" else name.replace(".", joint))
        state |= {f"{key}.{down}": a, f"{key}.{up}": b}
        alpha = 2.5 if "qkv" in name else 9.0
        if alphas:
            state[f"{key}.alpha"] = torch.tensor(alpha)
        updated = weight + (alpha / RANK if alphas else 1) * (b @ a)
        if style == "DoRA":
            magnitude = 1 + draw(weight.shape[0]).abs()
            state[f"{key}.lora_magnitude_vector"] = magnitude
            updated = updated * (magnitude / updated.norm(dim=1))[:, None]
        merged[f"{name}.weight"] = updated
    save_file(state, tmp_path / "theirs.safetensors")
    base = transformer_of(klein, checkpoint)
    plain, expected = velocity(base), velocity(transformer_of(klein, merged))
    assert load_adapter(base, str(tmp_path / "theirs.safetensors"), "mine") == LAYERS
    assert (expected - plain).norm() > 0.1 * plain.norm()
    assert (velocity(base) - expected).norm() < 1e-4 * (expected - plain).norm()


def own(klein: Model, folder: Path, targets: str, **options: Any) -> Path:
    """An adapter as a run saves it, with values at random and a strength of its own."""
    transformer = load_transformer(klein, FP32, CPU)
    attach(transformer, Adapter(rank=4, alpha=6, targets=targets, **options), seed=0)
    randomise(transformer)
    return save_adapter(transformer, folder, {})


def through(klein: Model, file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities: without an adapter, with plain diffusers' loading of it, and with ours."""
    pipeline = Flux2KleinPipeline.from_pretrained(klein.path, torch_dtype=torch.float32)
    base = velocity(pipeline.transformer)
    pipeline.load_lora_weights(file)
    ours = load_transformer(klein, FP32, CPU)
    load_adapter(ours, str(file), "mine")
    return base, velocity(pipeline.transformer), velocity(ours)


READ = {  # what plain diffusers reads rightly: not the final layer's modulation, and of kohya's few outside the blocks
    "diffusers": ".*",
    "ai-toolkit": "(?!norm_out).*",
    "kohya": r".*transformer_blocks\..*|x_embedder|context_embedder|time_guidance_embed\..*|proj_out",
}


@pytest.mark.parametrize("form", READ)
def test_plain_diffusers_reads_what_is_written_for_it(form: str, klein: Model, tmp_path: Path) -> None:
    file = own(klein, tmp_path / "own", READ[form])
    written = convert(Convert(Source(str(file)), form, str(tmp_path / "one.safetensors")))
    base, theirs, ours = through(klein, written)
    assert (ours - base).norm() > 0.1 * base.norm()
    assert (theirs - ours).norm() < 1e-4 * (ours - base).norm()


def test_what_plain_diffusers_does_not_read(klein: Model, tmp_path: Path) -> None:
    """As docs/adapters.md says; where this fails, diffusers has learned it."""
    file = own(klein, tmp_path / "own", "attention+mlp")
    comfy = convert(Convert(Source(str(file)), "comfyui", str(tmp_path / "comfy.safetensors")))
    base, theirs, ours = through(klein, comfy)
    assert torch.equal(base, theirs) and (ours - base).norm() > 0.003 * base.norm()  # nothing is loaded, no error
    toolkit = convert(Convert(Source(str(file)), "ai-toolkit", str(tmp_path / "toolkit.safetensors")))
    state = load_file(toolkit)
    alphas = {f"{key[: -len('.lora_A.weight')]}.alpha": torch.tensor(4.0) for key in state if "_A." in key}
    save_file(state | alphas, tmp_path / "alphas.safetensors")
    with pytest.raises(ValueError, match="should be empty"):
        through(klein, tmp_path / "alphas.safetensors")
    peft = convert(Convert(Source(str(file)), "peft", str(tmp_path / "peft"))) / PEFT_FILE
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    (tmp_path / "peft" / PEFT_CONFIG).write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
    base, theirs, thrice = through(klein, peft)
    assert (theirs - ours).norm() < 1e-4 * (ours - base).norm() < 1e-4 * (thrice - base).norm()
    last = own(klein, tmp_path / "last", r"norm_out\.linear")
    last = convert(Convert(Source(str(last)), "ai-toolkit", str(tmp_path / "last.safetensors")))
    base, theirs, ours = through(klein, last)
    assert (theirs - ours).norm() > 0.1 * (ours - base).norm()  # its halves are the other way round


def test_dora_and_parts_of_fused_layers_keep_what_they_mean(klein: Model, tmp_path: Path) -> None:
    dora = own(klein, tmp_path / "dora", "attention+mlp", dora=True)
    base, theirs, ours = through(klein, dora)
    assert (theirs - ours).norm() < 1e-4 * (ours - base).norm()
    again = convert(Convert(Source(str(dora)), "kohya", str(tmp_path / "kohya.safetensors")))
    assert any(key.endswith("img_attn_qkv.dora_scale") for key in load_file(again))
    before, after = read_pairs(str(dora)), read_pairs(str(again))
    for layer, pair in before.items():
        assert pair.magnitude is not None and torch.equal(pair.magnitude.flatten(), after[layer].magnitude)
    for form in ("comfyui", "ai-toolkit"):
        with pytest.raises(ValueError, match=f"{form} files hold no DoRA"):
            convert(Convert(Source(str(dora)), form, str(tmp_path / f"{form}.safetensors")))
    draw, state = small(3), {}
    for layer, rows, rank in (
        ("transformer_blocks.1.attn.to_k", 1, 2),
        ("transformer_blocks.1.attn.add_v_proj", 1, 3),
        ("transformer_blocks.0.attn.to_q", 1, 4),
        ("transformer_blocks.0.attn.to_v", 1, 5),
        ("single_transformer_blocks.1.attn.to_qkv_mlp_proj", 9, 6),
    ):
        key = f"transformer.{layer}"
        state |= {f"{key}.lora_A.weight": draw(rank, WIDTH), f"{key}.lora_B.weight": draw(rows * WIDTH, rank)}
    save_file(state, tmp_path / "own.safetensors")
    first = read_pairs(str(tmp_path / "own.safetensors"))
    expected = None
    for form in ("diffusers", "kohya", "comfyui", "ai-toolkit"):
        file = convert(
            Convert(Source(str(tmp_path / "own.safetensors")), form, str(tmp_path / f"{form}.st.safetensors"))
        )
        back = read_pairs(str(file))
        assert {layer: pair.down.shape for layer, pair in back.items()} == {
            layer: pair.down.shape for layer, pair in first.items()
        }
        base, theirs, ours = through(klein, file)
        expected = ours if expected is None else expected
        assert (ours - expected).norm() < 1e-4 * (ours - base).norm()
        if form != "comfyui":
            assert (theirs - ours).norm() < 1e-4 * (ours - base).norm()


def test_every_format_becomes_every_other(klein: Model, tmp_path: Path) -> None:
    file = own(klein, tmp_path / "own", "all", rslora=True)
    first = read_pairs(str(file))
    for i, form in enumerate(FORMATS):
        out = tmp_path / (f"{i}" if form == "peft" else f"{i}.safetensors")
        middle = convert(Convert(Source(str(file)), form, str(out)))
        for j, other in enumerate(FORMATS):
            out = tmp_path / (f"{i}-{j}" if other == "peft" else f"{i}-{j}.safetensors")
            last = read_pairs(str(convert(Convert(Source(str(middle)), other, str(out)))))
            assert last.keys() == first.keys()
            for layer, pair in first.items():
                assert pair.down.shape == last[layer].down.shape
                update = last[layer].strength * last[layer].up @ last[layer].down
                torch.testing.assert_close(update, pair.strength * pair.up @ pair.down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["diffusion_model.transformer_blocks", "diffusion_model.sformer_blocks"])
def test_diffusers_names_where_others_stand(prefix: str, klein: Model, tmp_path: Path) -> None:
    file = own(klein, tmp_path / "own", r"transformer_blocks\..*")
    state = {key.replace("transformer.transformer_blocks", prefix): value for key, value in load_file(file).items()}
    save_file(state, tmp_path / "theirs.safetensors")
    base, theirs, ours = through(klein, tmp_path / "theirs.safetensors")
    assert (ours - base).norm() > 0.003 * base.norm()
    assert (theirs - ours).norm() < 1e-4 * (ours - base).norm()


def test_names_that_families_share_are_within_the_same(klein: Model, tiny: Model) -> None:
    shared = 0
    for layer in linear_shapes(read_config(klein, "transformer")).keys() | linear_shapes(
        read_config(tiny, "transformer")
    ):
        name, layers = original_name(layer)
        for family in (flux1, flux2):
            if layers_of(layer, family):
                assert layers_of(name, family) == layers and layer in layers
                shared += 1
    assert shared > 80


def pair(name: str, rows: int, columns: int, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    draw = small(7)
    return {
        f"{prefix}{name}.lora_A.weight": draw(2, columns),
        f"{prefix}{name}.lora_B.weight": draw(rows, 2),
    }


@pytest.mark.parametrize("name", ["single_blocks.0.linear1", "single_blocks.0.linear2", "double_blocks.1.img_mlp.0"])
def test_the_sizes_of_a_layer_tell_the_family(name: str) -> None:
    shapes: dict[str, dict[Any, Linear]] = {
        "single_blocks.0.linear1": {flux1: Linear(7 * 64, 64), flux2: Linear(9 * 64, 64), None: Linear(8 * 64, 64)},
        "single_blocks.0.linear2": {flux1: Linear(64, 5 * 64), flux2: Linear(64, 4 * 64), None: Linear(64, 64)},
        "double_blocks.1.img_mlp.0": {flux1: Linear(4 * 64, 64), flux2: Linear(6 * 64, 64), None: Linear(64, 64)},
    }
    both = {"double_blocks.0.img_attn.qkv": Linear(3 * 64, 64), "time_in.in_layer": Linear(64, 256)}
    file = Path("one.safetensors")
    for family, shape in shapes[name].items():
        if family is not None:
            assert file_family(file, both | {name: shape}, None) is family
            continue
        with pytest.raises(ValueError, match=rf"does not fit any model at {name}: B has .* in FLUX\.1 and .* in FLUX"):
            file_family(file, {name: shape}, None)
    contrary = {"single_blocks.3.linear2": shapes["single_blocks.0.linear2"][flux1], name: shapes[name][flux2]}
    with pytest.raises(ValueError, match="does not fit any model at"):
        file_family(file, contrary, None)


def test_where_nothing_in_the_file_tells_the_model_does(klein: Model, tiny: Model, tmp_path: Path) -> None:
    save_file(pair("time_in.out_layer", WIDTH, WIDTH), tmp_path / "time.safetensors")
    file = str(tmp_path / "time.safetensors")
    with pytest.raises(ValueError, match=r"does not tell which model it is for: time_in\.out_layer is in FLUX\.1 and "):
        read_pairs(file)
    layers = linear_shapes(read_config(klein, "transformer"))
    assert list(fitting_pairs(file, layers)) == ["time_guidance_embed.timestep_embedder.linear_2"]
    old = {name: Linear(WIDTH, WIDTH) for name in linear_shapes(read_config(tiny, "transformer"))}
    assert list(fitting_pairs(file, old)) == ["time_text_embed.timestep_embedder.linear_2"]
    with pytest.raises(ValueError, match="mixes two adapters"):
        mixed = pair("single_blocks.0.modulation.lin", 3 * WIDTH, WIDTH)
        save_file(mixed | pair("single_stream_modulation.lin", 3 * WIDTH, WIDTH), tmp_path / "mixed.safetensors")
        read_pairs(str(tmp_path / "mixed.safetensors"))


BASE = KLEIN["transformer"]
MISFITS = {  # a file's layers, the model's config, and what is said
    "FLUX.1 on klein, by kohya's names": (
        pair("single_blocks.3.linear1", 7 * 3072, 3072), BASE,
        r"4 of 4 layers are unknown to it .*own base model: it fits black-forest-labs/FLUX\.1-dev, ",
    ),
    "FLUX.1 on klein, by diffusers' names": (
        pair("transformer_blocks.0.ff.net.2", 3072, 4 * 3072), BASE, r"model: it fits black-forest-labs/FLUX\.1-dev",
    ),
    "klein on FLUX.1, by ComfyUI's names": (
        pair("single_blocks.3.linear1", 9 * 3072, 3072), flux1.SIZES["black-forest-labs/FLUX.1-dev"]["transformer"],
        r"unknown to it .* it fits black-forest-labs/FLUX\.2-klein-base-4B, black-forest-labs/FLUX\.2-klein-4B$",
    ),
    "klein 9B on 4B": (
        pair("double_blocks.3.img_attn.qkv", 3 * 4096, 4096), BASE,
        r"maps 4096 to 4096 features where the layer maps 3072 to 3072; .*it fits black-forest-labs/FLUX\.2-.*-9B,",
    ),
    "blocks that klein 4B has not": (
        pair("double_blocks.6.img_attn.proj", 4096, 4096), BASE, r"unknown to it .*FLUX\.2-klein-base-9B",
    ),
    "a small FLUX.2 of nobody's": (
        pair("single_blocks.3.linear1", 9 * 32, 32), BASE, r"maps 32 to 288 .*it is for FLUX\.2; choose the adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", MISFITS)
def test_adapters_of_other_models_are_named_with_theirs(how: str, tmp_path: Path) -> None:
    state, config, said = MISFITS[how]
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match=said):
        fitting_pairs(str(tmp_path / "theirs.safetensors"), linear_shapes(config))


@pytest.mark.parametrize(
    "key, said",
    [
        ("lokr_w1", "has no lokr_w2_a for"),  # these two are read as the LoRA that adds the same
        ("hada_w1_a", "has no hada_w1_b for"),
        ("oft_blocks", "OFT of outputs, .*merge it into the weights with the program"),
    ],
)
@pytest.mark.parametrize(
    "name", ["diffusion_model.single_blocks.0.linear1", "lycoris_transformer_blocks_0_ff_linear_in"]
)
def test_other_kinds_of_adapters_are_named(name: str, key: str, said: str, tmp_path: Path) -> None:
    save_file({f"{name}.{key}": torch.ones(2, 2), f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match=said):
        read_pairs(str(tmp_path / "theirs.safetensors"))


def test_a_quantized_klein_takes_them_too(klein: Model, tmp_path: Path) -> None:
    file = own(klein, tmp_path / "own", "attention")
    toolkit = convert(Convert(Source(str(file)), "ai-toolkit", str(tmp_path / "toolkit.safetensors")))
    first = None
    for path in (file, toolkit):
        transformer = load_transformer(klein, Precision("nf4", compute_dtype="fp32"), CPU)
        base = velocity(transformer)
        load_adapter(transformer, str(path), "mine")
        first = velocity(transformer) if first is None else first
        assert (velocity(transformer) - first).norm() < 1e-4 * (first - base).norm()
