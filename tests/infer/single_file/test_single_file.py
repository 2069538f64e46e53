"""Checkpoints from single files: the same weights as those of diffusers' folders, at every precision, part by part."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from torch import Tensor

from infer.checkpoint.family import latent_map, takes_references
from infer.checkpoint.file_checks import check_written
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.headers import check_model
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.checkpoint.originals import Originals
from infer.checkpoint.save import save_checkpoint
from infer.checkpoint.sources import file_of, rest_of
from infer.checkpoint.text import load_text_parts
from infer.family import find, flux1_sizes
from infer.quantize.precision import Precision
from infer.single_file.contents import published
from infer.single_file.weights import Weights
from tests.infer.single_file import files

CPU = torch.device("cpu")


@pytest.fixture(params=["tiny", "klein"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def same(one: Any, other: Any) -> None:
    """Two loaded models have the same tensors, quantized ones with their scales."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.fixture
def made(model: Model, tmp_path: Path) -> Path:
    """The transformer in a file with Black Forest Labs' names."""
    return files.saved(tmp_path / "mine.safetensors", files.original(files.part(model.path, "transformer")))


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_a_file_and_a_folder_have_the_same_weights(model: Model, made: Path, kind: str) -> None:
    single = Model(str(made), parts=model.path)
    check_model(single)
    loaded = load_transformer(single, Precision(kind), CPU)
    same(loaded, load_transformer(model, Precision(kind), CPU))
    assert (
        dict(loaded.config)["axes_dims_rope"]
        == json.loads(Path(model.path, "transformer", "config.json").read_text())["axes_dims_rope"]
    )


def test_tensors_are_read_once_and_let_go(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model is asked for its state a few times, not for each tensor."""
    file = files.saved(tmp_path / "mine.safetensors", files.original(files.part(tiny.path, "transformer")))
    given: dict[str, weakref.ref[Tensor]] = {}
    alive, asked = [], [0]
    read, state = Weights.__getitem__, FluxTransformer2DModel.state_dict

    def noted(self: Weights, name: str) -> Tensor:
        assert name not in given
        value = read(self, name).clone()
        given[name] = weakref.ref(value)
        alive.append(sum(one() is not None and one().dim() == 2 for one in given.values()))  # type: ignore[union-attr]
        return value

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[0] += 1
        return state(self, *args, **kwargs)

    monkeypatch.setattr(Weights, "__getitem__", noted)
    monkeypatch.setattr(FluxTransformer2DModel, "state_dict", counted)
    load_transformer(Model(str(file), parts=tiny.path), Precision("nf4"), CPU)
    assert len(given) > 100 and max(alive) <= 2 and 0 < asked[0] < 5


def test_names_are_read_as_diffusers_own_converter_reads_them(model: Model, made: Path) -> None:
    config = json.loads(Path(model.path, "transformer", "config.json").read_text())
    theirs = files.converted(made, config["attention_head_dim"] * config["num_attention_heads"])
    ours = Originals(Model(str(made), parts=model.path))
    assert set(ours.tensors) == set(theirs)
    assert all(torch.equal(ours.tensors[name], value) for name, value in theirs.items())


def test_a_mixture_and_skipped_layers(model: Model, made: Path) -> None:
    precision = Precision("nf4", layers={r"transformer_blocks\..*": "int8"}, skip_modules=["x_embedder"])
    same(load_transformer(Model(str(made), parts=model.path), precision, CPU), load_transformer(model, precision, CPU))


@pytest.mark.parametrize(("scaled", "rows"), [("", False), ("scale_weight", False), ("weight_scale", True)])
def test_fp8(model: Model, made: Path, tmp_path: Path, scaled: str, rows: bool) -> None:
    weights = files.part(model.path, "transformer")
    whole = files.fp8(files.original(weights), scaled, rows) | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    single = files.saved(tmp_path / "fp8.safetensors", files.prefixed(whole, "model.diffusion_model."))
    check_model(Model(str(single), parts=model.path))
    read = Originals(Model(str(single), parts=model.path)).tensors
    for name, value in weights.items():
        # half of the last of three bits, of values that are anywhere between two powers of 2
        assert distance(read[name], value) < 0.04 if value.ndim == 2 else torch.equal(read[name], value)
    name = "transformer_blocks.1.attn.to_k.weight"
    if not scaled:  # by the library's own cast
        assert torch.equal(read[name], weights[name].to(torch.float8_e4m3fn).float())
    if rows:  # of rows that are some of a tensor's in the file
        most = weights[name].float().abs().amax(1, keepdim=True) / 448
        assert torch.equal(read[name], (weights[name].float() / most).to(torch.float8_e4m3fn).float() * most)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "BF16"])
def test_gguf_is_dequantized_as_the_gguf_package_does(tiny: Model, tmp_path: Path, kind: str) -> None:
    import gguf

    weights = files.original(files.part(tiny.path, "transformer"))
    single = files.gguf_file(tmp_path / "a.gguf", weights, kind)
    model = Model(str(single), parts=tiny.path)
    check_model(model)
    read, wanted = Originals(model).tensors, gguf.GGMLQuantizationType[kind]
    whole = weights["double_blocks.1.txt_attn.qkv.weight"].float().numpy()
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(whole, wanted), wanted)).chunk(3)
    for name, value in zip(("add_q_proj", "add_k_proj", "add_v_proj"), theirs, strict=True):
        assert torch.allclose(read[f"transformer_blocks.1.attn.{name}.weight"].float(), value, rtol=1e-6, atol=0)
    assert torch.equal(read["proj_out.bias"], weights["final_layer.linear.bias"].float())


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"])
def test_kinds_without_a_quantizer_of_their_own(tiny: Model, tmp_path: Path, kind: str) -> None:
    """Random bytes as weights: what they mean is the gguf package's to say."""
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    weights = files.original(files.part(tiny.path, "transformer"))
    name = "single_blocks.2.linear1.weight"
    rows, columns = weights[name].shape
    random = torch.randint(0, 64, (rows, columns // block * size), dtype=torch.uint8).numpy()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for each, value in weights.items():
        if each == name:
            writer.add_tensor(each, random, raw_dtype=wanted)
        else:
            writer.add_tensor(each, value.float().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    read = Originals(Model(str(tmp_path / "a.gguf"), parts=tiny.path)).tensors
    theirs = torch.from_numpy(gguf.quants.dequantize(random, wanted))[256:512]
    assert torch.allclose(read["single_transformer_blocks.2.attn.to_k.weight"], theirs, rtol=1e-5, atol=1e-7)


def encoders(model: Model) -> dict[str, files.Weights]:
    """The text encoders and the autoencoder of a folder, as a single file has them."""
    whole = {"vae": files.prefixed(files.original_autoencoder(files.part(model.path, "vae")), "vae.")}
    if not Path(model.path, "text_encoder_2").is_dir():
        return whole | {"text": files.part(model.path, "text_encoder")}
    clip = files.prefixed(files.part(model.path, "text_encoder"), "text_encoders.clip_l.transformer.text_model.")
    t5 = files.prefixed(files.part(model.path, "text_encoder_2"), "text_encoders.t5xxl.transformer.")
    return whole | {"text": clip, "text_2": t5}


def same_parts(one: Model, other: Model, precision: Precision) -> None:
    first, second = load_text_parts(one, precision, CPU), load_text_parts(other, precision, CPU)
    assert first.keys() == second.keys()
    for name, part in first.items():
        if name.startswith("text_encoder"):
            same(part, second[name])
    same(load_vae(one, CPU), load_vae(other, CPU))
    (a, b) = latent_map(one), latent_map(other)
    assert torch.equal(torch.as_tensor(a.shift), torch.as_tensor(b.shift))
    assert torch.equal(torch.as_tensor(a.scale), torch.as_tensor(b.scale))


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_everything_in_one_file(model: Model, tmp_path: Path, kind: str) -> None:
    whole = files.prefixed(files.original(files.part(model.path, "transformer")), "model.diffusion_model.")
    for weights in encoders(model).values():
        whole |= weights
    single = Model(str(files.saved(tmp_path / "all.safetensors", whole)), parts=model.path)
    check_model(single)
    assert {part: file_of(single, part) == Path(single.path) for part in ("transformer", "vae", "text_encoder")} == {
        "transformer": True, "vae": True, "text_encoder": True,
    }  # fmt: skip
    same_parts(single, model, Precision(kind))
    same(load_transformer(single, Precision(kind), CPU), load_transformer(model, Precision(kind), CPU))


def test_parts_in_files_of_their_own(model: Model, tmp_path: Path) -> None:
    named: dict[str, str] = {}
    for name, weights in encoders(model).items():
        own = {each.removeprefix("vae."): value for each, value in weights.items()} if name == "vae" else weights
        named[name] = str(files.saved(tmp_path / f"{name}.safetensors", own))
    beside = Model(model.path, **named)
    check_model(beside)
    same_parts(beside, model, Precision("nf4"))
    for part, option in (("vae", "vae"), ("text_encoder", "text")):
        before = fingerprint(beside, part)
        assert before != fingerprint(model, part)
        file = Path(named[option])
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        assert fingerprint(beside, part) != before
        assert fingerprint(beside, "transformer") == fingerprint(model, "transformer")


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_text_encoders_of_llama_cpp(model: Model, tmp_path: Path, kind: str) -> None:
    part, option, architecture = ("text_encoder_2", "text_2", "t5encoder")
    if not Path(model.path, part).is_dir():
        part, option, architecture = ("text_encoder", "text", "qwen3")
    weights = files.llama_cpp(files.part(model.path, part))
    single = files.gguf_file(tmp_path / "text.gguf", weights, kind, architecture)
    beside = Model(model.path, **{option: str(single)})
    check_model(beside)
    ours, theirs = (load_text_parts(each, Precision("bf16"), CPU)[part].state_dict() for each in (beside, model))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert distance(ours[name], value) < (0.01 if kind == "Q8_0" else 1e-9) + 1e-9, name


def test_a_file_is_saved_as_a_quantized_folder_once(model: Model, made: Path, tmp_path: Path) -> None:
    vae = files.original_autoencoder(files.part(model.path, "vae"))
    single = Model(str(made), parts=model.path, vae=str(files.saved(tmp_path / "ae.safetensors", vae)))
    folder = Model(str(save_checkpoint(single, Precision("nf4"), tmp_path / "out", CPU)))
    check_model(folder)
    same(load_transformer(folder, Precision("nf4"), CPU), load_transformer(model, Precision("nf4"), CPU))
    same_parts(folder, model, Precision("nf4"))


def test_the_published_model_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By sizes and name, with blocks that are narrow, so that no file of 24 GB is needed."""
    narrow = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
    for sizes in find.SIZES.values():
        monkeypatch.setitem(sizes, "transformer", sizes["transformer"] | narrow | {"axes_dims_rope": [4, 4, 4, 4]})
    assert flux1_sizes.DEV["transformer"]["num_layers"] == 1
    for stem, path in {
        "flux1-dev": "black-forest-labs/FLUX.1-dev",
        "flux1-dev-fp8": "black-forest-labs/FLUX.1-dev",
        "my_own_mix_v3": "black-forest-labs/FLUX.1-dev",
        "flux1-schnell": "black-forest-labs/FLUX.1-schnell",
        "flux1-kontext-dev_fp8_scaled": "black-forest-labs/FLUX.1-Kontext-dev",
        "flux1-krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
        "flux-2-klein-4b": "black-forest-labs/FLUX.2-klein-4B",
        "flux-2-klein-base-4b-fp8": "black-forest-labs/FLUX.2-klein-base-4B",
        "flux2_dev": "black-forest-labs/FLUX.2-dev",
    }.items():
        config = find.SIZES[path]["transformer"]
        family = find.of_config(config)
        sizes = {name: tuple(layer) for name, layer in family.linear_shapes(config).items()}
        sizes |= {name: (size,) for name, size in family.norm_sizes(config).items()}
        weights = {f"{name}.weight": torch.zeros(size, dtype=torch.float8_e4m3fn) for name, size in sizes.items()}
        file = files.saved(tmp_path / f"{stem}.safetensors", weights)
        assert published(file) == path, stem
        assert rest_of(Model(str(file))).path == path
        assert takes_references(Model(str(file))) == ("kontext" in stem or "2" in path.rpartition("/")[2])  # no network


def test_files_that_do_not_fit(tiny: Model, klein: Model, tmp_path: Path) -> None:
    import gguf

    weights = files.original(files.part(tiny.path, "transformer"))
    qkv = "double_blocks.0.img_attn.qkv.weight"
    put = lambda name, tensors: str(files.saved(tmp_path / f"{name}.safetensors", tensors))  # noqa: E731
    good = put("good", weights)
    two = put("two", files.original(files.part(klein.path, "transformer")))
    ae = put("ae", files.original_autoencoder(files.part(tiny.path, "vae")))
    t5 = put("t5", files.part(tiny.path, "text_encoder_2"))
    qwen = put("qwen", files.part(klein.path, "text_encoder"))
    half = put("half", {name: value for name, value in weights.items() if name != qkv})
    lacking = put("lacking", {name: value for name, value in weights.items() if "txt_mlp.2.bias" not in name})
    wide = put("wide", weights | {"double_blocks.1.img_mlp.0.weight": torch.zeros(8, 8)})
    packed = put("packed", weights | {qkv: torch.zeros(weights[qkv].shape, dtype=torch.uint8)})
    bnb = put("bnb", weights | {qkv: torch.zeros(weights[qkv].numel() // 2, 1, dtype=torch.uint8)})
    blocks = put("blocks", files.fp8(weights) | {qkv.replace("weight", "weight_scale"): torch.ones(3, 8)})
    nvfp4 = put("nvfp4", files.fp8(weights) | {qkv.replace("weight", "weight_scale_2"): torch.ones(())})
    chroma = put("chroma", {"distilled_guidance_layer.in_proj.weight": torch.ones(2, 2)})
    nothing = put("nothing", {"a.weight": torch.ones(2, 2)})
    clip = put("clip", {"text_model.embeddings.token_embedding.weight": torch.ones(9, 7)})
    line = put("line", {"text_model.embeddings.token_embedding.weight": torch.ones(9)})
    mark = put("mark", weights | {"img_in.weight": torch.zeros(8)})
    norm = put("norm", weights | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(())})
    (tmp_path / "cut.safetensors").write_bytes(Path(good).read_bytes()[:-9])
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(9))
    llama = files.gguf_file(tmp_path / "llama.gguf", {"token_embd.weight": torch.ones(2, 32)}, "F16", "llama")
    tq = gguf.GGUFWriter(tmp_path / "tq.gguf", "flux")
    for name, value in weights.items():
        whole = value.float().numpy()
        raw = gguf.GGMLQuantizationType.TQ2_0 if name == qkv else None
        tq.add_tensor(name, gguf.quants.quantize(whole, raw) if raw else whole, raw_dtype=raw)
    for write in (tq.write_header_to_file, tq.write_kv_data_to_file, tq.write_tensors_to_file):
        write()
    tq.close()
    for options, said in (
        ({"path": good}, r"model\.parts is null, and no published model has the sizes of .*; name the"),
        ({"path": good, "parts": klein.path}, r"the transformer of FLUX\.1, and model\.parts .* is of FLUX\.2; name"),
        ({"path": two, "parts": tiny.path}, r"the transformer of FLUX\.2, and model\.parts .* is of FLUX\.1; name"),
        ({"path": good, "parts": str(tmp_path)}, "holds no model_index.json; name a diffusers folder"),
        ({"path": good, "parts": "no where"}, r"model\.parts 'no where' is no folder here and no Hub id"),
        ({"path": ae}, r"holds no transformer; give it as model\.vae, and the transformer's file"),
        ({"path": qwen}, r"holds no transformer; give it as model\.text, and"),
        ({"path": half, "parts": tiny.path}, r"holds no transformer of FLUX\.1 and FLUX\.2 .*Black Forest Labs"),
        ({"path": nothing}, r"holds no transformer of FLUX\.1 and FLUX\.2 \(its tensors are a\.weight"),
        ({"path": chroma}, r"is of Chroma; this toolkit reads FLUX\.1 and FLUX\.2"),
        ({"path": lacking, "parts": tiny.path}, r"lacks 2 of the transformer's tensors .*download it again"),
        ({"path": wide, "parts": tiny.path}, r"stores double_blocks\.1\.img_mlp\.0\.weight in the size \(8, 8\)"),
        ({"path": packed, "parts": tiny.path}, r"qkv\.weight as U8, which is not read; give the bf16, fp8 or GGUF"),
        ({"path": bnb, "parts": tiny.path}, r"qkv\.weight as U8, which is not read; give the bf16, fp8 or GGUF"),
        ({"path": packed}, r"qkv\.weight as U8, which is not read; give the bf16, fp8 or GGUF"),
        ({"path": blocks, "parts": tiny.path}, r"as e4m3 with scales of size \(3, 8\), where fp8 has one for all"),
        ({"path": nvfp4, "parts": tiny.path}, r"the scale of a format that is not read"),
        ({"path": str(tmp_path / "tq.gguf"), "parts": tiny.path}, r"qkv\.weight as TQ2_0, which is not read; give"),
        ({"path": str(tmp_path / "cut.safetensors")}, r"cannot read .*cut\.safetensors.*; download it again"),
        ({"path": str(tmp_path / "cut.gguf")}, r"cannot read .*cut\.gguf.*; download it again"),
        ({"path": tiny.path, "vae": t5}, r"model\.vae .* is no vae of FLUX\.1; give it as model\.text_2"),
        ({"path": tiny.path, "text": ae}, r"model\.text .* is no text_encoder of FLUX\.1; give it as model\.vae"),
        ({"path": tiny.path, "text_2": good}, r"model\.text_2 .* it holds a transformer: give it as model\.path"),
        ({"path": tiny.path, "text_2": qwen}, r"it holds the text_encoder of FLUX\.2: give the file that belongs"),
        ({"path": tiny.path, "text": clip}, r"model\.text .* is of another size: .* asks for 128 in place of 7"),
        ({"path": tiny.path, "text": line}, r"model\.text .* is damaged: .* is of size \(9,\); download it again"),
        ({"path": mark, "parts": tiny.path}, r"x_embedder\.weight is of size \(8,\), where 2 are due; download"),
        ({"path": norm}, r"norm_q\.weight is of size \(\), where 1 are due; download it again"),
        ({"path": tiny.path, "text_2": str(llama)}, r"is a GGUF of llama, where qwen3 and t5 and t5encoder are read"),
        ({"path": klein.path, "text_2": t5}, r"\.text_2 names a file of the text_encoder_2, which FLUX\.2 has not"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check_model(Model(**options))


def test_settings_without_effect(tiny: Model) -> None:
    for options, said in (
        ({"parts": tiny.path}, r"model\.parts has no effect on .*, which is no file here"),
        ({"vae": "gone.safetensors"}, r"model\.vae is 'gone\.safetensors', which is no file here"),
        ({"text": ""}, r"model\.text is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            Model(tiny.path, **options)
    with pytest.raises(ValueError, match=r"model\.parts has no effect beside model\.weights=random"):
        Model("black-forest-labs/FLUX.1-dev", weights="random", parts="a/b")


def test_gguf_without_its_package(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    monkeypatch.setattr("infer.single_file.header.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is a GGUF file, which the package gguf reads; install it: pip install"):
        check_model(Model(str(tmp_path / "a.gguf"), parts=tiny.path))


def test_half_of_an_encoder_is_not_saved(klein: Model, tmp_path: Path) -> None:
    """FLUX.2-dev's encoder has eyes, which no file of it holds."""
    shutil.copytree(klein.path, tmp_path / "dev")
    file = tmp_path / "dev" / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "mistral3", "text_config": config | {"model_type": "mistral"}}))
    single = files.saved(tmp_path / "mistral.safetensors", files.part(klein.path, "text_encoder"))
    with pytest.raises(ValueError, match=r"holds the language model of the text_encoder alone.* leave model\.text at"):
        check_written(Model(str(tmp_path / "dev"), text=str(single)))
    check_written(Model(klein.path, text=str(single)))


def test_mistral_without_its_eyes(klein: Model, tmp_path: Path) -> None:
    """A random small Mistral 3 of 30 layers, whose language model is in a file."""
    shutil.copytree(klein.path, tmp_path / "dev", ignore=shutil.ignore_patterns("text_encoder"))
    text = {"model_type": "mistral", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
            "num_hidden_layers": 30, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    eyes = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
    whole = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=eyes)
    )
    whole.bfloat16().save_pretrained(tmp_path / "dev" / "text_encoder")
    weights = whole.model.language_model.state_dict()
    single = files.saved(tmp_path / "mistral.safetensors", files.prefixed(weights, "model."))
    model, beside = Model(str(tmp_path / "dev")), Model(str(tmp_path / "dev"), text=str(single))
    check_model(beside)
    for kind in ("bf16", "nf4"):
        one, other = (load_text_parts(each, Precision(kind), CPU)["text_encoder"] for each in (model, beside))
        same(one, other)
