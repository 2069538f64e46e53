"""LoRA files as other programs write them, named in ways that nobody listed, against the updates that they mean."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infer.adapter.foreign_files import KINDS, OTHERS
from infer.adapter.read import FILE, find_adapter, read_notes, read_pairs
from infer.adapter.strengths import PEFT_CONFIG
from infer.adapter.write import FORMATS
from infer.convert import Convert, Source, convert

WIDTH, RANK = 16, 3
Q, OUT = "transformer_blocks.1.attn.to_q", "single_transformer_blocks.2.proj_out"
K, MLP = "single_transformer_blocks.2.attn.to_k", "single_transformer_blocks.2.proj_mlp"
SHAPES = {Q: (WIDTH, WIDTH), OUT: (WIDTH, 5 * WIDTH), K: (WIDTH, WIDTH), MLP: (4 * WIDTH, WIDTH)}
ALL, WRITE = "single_transformer_blocks.2.attn.to_qkv_mlp_proj", "single_transformer_blocks.2.attn.to_out"
ADDED, IN = "transformer_blocks.1.attn.add_v_proj", "transformer_blocks.1.ff.linear_in"
SHAPES_2 = {Q: (WIDTH, WIDTH), ADDED: (WIDTH, WIDTH), ALL: (9 * WIDTH, WIDTH), WRITE: (WIDTH, 4 * WIDTH),
            IN: (6 * WIDTH, WIDTH)}  # fmt: skip
FAMILIES = pytest.mark.parametrize("shapes", [SHAPES, SHAPES_2], ids=["FLUX.1", "FLUX.2"])


def drawn(names: dict[str, str], up: str, down: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file's tensors: for each of diffusers' layers its name there; up, down: what stands behind it."""
    own, state = torch.Generator().manual_seed(0), {}
    for layer, (rows, columns) in (SHAPES | SHAPES_2).items():
        a, b = torch.randn(RANK, columns, generator=own).to(dtype), torch.randn(rows, RANK, generator=own).to(dtype)
        if layer in names:
            state |= {f"{names[layer]}.{down}": a, f"{names[layer]}.{up}": b}
    return state


def updates(path: Path) -> dict[str, Tensor]:
    return {layer: pair.strength * pair.up.float() @ pair.down.float() for layer, pair in read_pairs(str(path)).items()}


def expected(layers: dict[str, str], strength: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    state = drawn({layer: layer for layer in layers}, "B", "A", dtype)
    return {layer: strength * state[f"{layer}.B"].float() @ state[f"{layer}.A"].float() for layer in layers}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for layer, update in wanted.items():
        torch.testing.assert_close(found[layer], update, msg=lambda said, layer=layer: f"{layer}: {said}")


def flat(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")


ORIGINAL = {Q: "double_blocks.1.img_attn.qkv.0", OUT: "single_blocks.2.linear2", K: "single_blocks.2.linear1.1",
            MLP: "single_blocks.2.linear1.3", ADDED: "double_blocks.1.txt_attn.qkv.2", ALL: "single_blocks.2.linear1",
            WRITE: "single_blocks.2.linear2", IN: "double_blocks.1.img_mlp.0"}  # fmt: skip
STYLES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "LyCORIS": (lambda layer: flat("lycoris_", layer), "lora_up.weight", "lora_down.weight"),
    "PEFT's state": (lambda layer: f"transformer.{layer}", "lora_B.default.weight", "lora_A.default.weight"),
    "an adapter's name": (lambda layer: f"transformer.{layer}", "lora_B.my_style-2.weight", "lora_A.my_style-2.weight"),
    "OneTrainer": (lambda layer: f"transformer.{ORIGINAL[layer]}", "lora_up.weight", "lora_down.weight"),
    "OneTrainer, flat": (lambda layer: flat("lora_transformer_", layer), "lora_up.weight", "lora_down.weight"),
    "OneTrainer, dotted": (lambda layer: f"lora_transformer.{layer}", "lora_up.weight", "lora_down.weight"),
    "compiled": (lambda layer: f"transformer._orig_mod.{layer}", "lora_B.weight", "lora_A.weight"),
    "compiled by block": (lambda layer: re.sub(r"(s\.\d)", r"\1._orig_mod", layer), "lora_B.weight", "lora_A.weight"),
    "DDP": (lambda layer: f"module.{layer}", "lora_B.default.weight", "lora_A.default.weight"),
    "FSDP": (lambda layer: layer.replace("attn.", "_fsdp_wrapped_module.attn."), "lora_B.weight", "lora_A.weight"),
}  # fmt: skip


@FAMILIES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, torch.tensor(6), torch.tensor([6.0], dtype=torch.float16)], ids=str)
def test_names_of_others(style: str, alpha: Tensor | None, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    name, up, down = STYLES[style]
    names = {layer: name(layer) for layer in shapes}
    state = drawn(names, up, down)
    if alpha is not None:
        state |= {f"{each}.alpha": alpha.clone() for each in names.values()}
    save_file(state, tmp_path / "theirs.safetensors")
    same(updates(tmp_path / "theirs.safetensors"), expected(names, 1.0 if alpha is None else 2.0))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("form", FORMATS)
@FAMILIES
def test_every_type_of_number_is_written_to_every_format(
    dtype: torch.dtype, form: str, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    names = {layer: flat("lora_unet_", layer) for layer in shapes}
    state = drawn(names, "lora_up.weight", "lora_down.weight", dtype)
    state |= {f"{name}.alpha": torch.tensor(RANK, dtype=torch.int64) for name in names.values()}
    save_file(state, tmp_path / "theirs.safetensors")
    wanted = expected(names, 1.0, dtype)
    same(updates(tmp_path / "theirs.safetensors"), wanted)
    out = tmp_path / ("folder" if form == "peft" else "ours.safetensors")
    written = convert(Convert(Source(str(tmp_path / "theirs.safetensors")), form, str(out)))
    same(updates(written), wanted)


@pytest.mark.parametrize("single", [True, False])
def test_peft_on_black_forest_labs_names(single: bool, tmp_path: Path) -> None:
    """Alone at strength 1, as plain diffusers reads such files; beside PEFT's configuration at what that says."""
    layers = {OUT: ORIGINAL[OUT], K: "single_blocks.2.linear1"} if single else {Q: "double_blocks.1.img_attn.qkv"}
    names = {layer: f"base_model.model.{name}" for layer, name in layers.items() if layer == OUT}
    state = drawn(names, "lora_B.weight", "lora_A.weight")
    fused = next(name for layer, name in layers.items() if layer != OUT)
    rows = (7 if single else 3) * WIDTH
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(RANK, WIDTH, generator=draw), torch.randn(rows, RANK, generator=draw)
    state |= {f"base_model.model.{fused}.lora_A.weight": down, f"base_model.model.{fused}.lora_B.weight": up}
    save_file(state, tmp_path / "adapter_model.safetensors")

    def check(strengths: tuple[float, float]) -> None:
        found = updates(tmp_path)
        if single:
            torch.testing.assert_close(found[OUT], expected({OUT: ""}, strengths[0])[OUT])
        parts = strengths[1] * up @ down
        kind, number = ("single_transformer_blocks", 2) if single else ("transformer_blocks", 1)
        layout = ["attn.to_q", "attn.to_k", "attn.to_v", *(["proj_mlp"] if single else [])]
        for i, layer in enumerate(layout):
            mine = parts[i * WIDTH : (i + 1) * WIDTH if i < 3 else None]
            torch.testing.assert_close(found[f"{kind}.{number}.{layer}"], mine)

    check((1.0, 1.0))
    config = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {fused.rpartition(".")[2]: 12}}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    check((2.0, 4.0))


def test_embeddings_in_the_bundle_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    names = {layer: flat("lora_transformer_", layer) for layer in SHAPES}
    state = drawn(names, "lora_up.weight", "lora_down.weight")
    state["bundle_emb.sks.t5"] = torch.ones(2, 8)
    save_file(state, tmp_path / "theirs.safetensors")
    with pytest.raises(
        ValueError, match=r"brings embeddings of words of its own .*\(1 tensors, such as bundle_emb.sks"
    ):
        read_pairs(str(tmp_path / "theirs.safetensors"))
    out = convert(Convert(Source(str(tmp_path / "theirs.safetensors")), "diffusers", str(tmp_path / "o"), True))
    same(updates(out), expected(names))
    save_file({"bundle_emb.sks.t5": torch.ones(2, 8)}, tmp_path / "words.safetensors")
    with pytest.raises(ValueError, match="the text encoder alone"):
        read_pairs(str(tmp_path / "words.safetensors"), drop_text_encoder=True)


TEXTS = ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "lora_te3_shared.alpha", "bundle_emb.a.clip_l",
         "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "lycoris_te1_model.lora_up.weight",
         "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
         "text_encoders.clip_l.transformer.text_model.lora_up.weight")  # fmt: skip
B = "double_blocks.0.img_attn.proj"
REASONS = {
    f"lycoris_{flat('', Q)}.hada_t1": "three factors", f"lycoris_{flat('', Q)}.lokr_w1": "has no lokr_w2_a",
    f"lycoris_{flat('', Q)}.hada_w1_a": "has no hada_w1_b",
    f"{flat('lora_unet_', B)}.oft_blocks": "OFT", f"transformer.{Q}.boft_R": "BOFT adapters are not LoRA",
    f"transformer.{Q}.oft_r": "OFT of another form", f"diffusion_model.{B}.diff": "whole differences of weights",
    f"transformer.{Q}.vera_lambda_b": "VeRA",
    f"{flat('lora_unet_', B)}.on_input": "IA3", f"{flat('lora_unet_', B)}.a1.weight": "GLoRA",
    f"{flat('lora_unet_', B)}.lora_mid.weight": "three factors",
    f"{flat('lora_unet_', B)}.dora_scale": "is not one of rows",
    f"diffusion_model.{B}.scale_weight": "fp8 numbers have scales", f"diffusion_model.{B}.diff_b": "biases or norms",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Canny and Depth", f"{B}.lora_B.default.bias": "Canny and Depth",
    "blocks.0.attn.a_to_qkv.lora_A.default.weight": "DiffSynth", f"{B}.weight": "checkpoint and no adapter; give it as",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "for Stable Diffusion or SDXL",
    "first_stage_model.encoder.conv_in.weight": "checkpoint and no adapter",
    "diffusion_model.content_mode_blocks.0.q_proj.lora_A.weight": "for FLUX.3",
    "diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight": "for Chroma",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight": "for Qwen-Image",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "for Wan", "lora_unet_blocks_0_cross_attn_q.alpha": "for Wan",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": "for Stable Diffusion 3",
    "diffusion_model.layers.0.attention.qkv.lora_A.weight": "for Lumina or Z-Image",
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "for LTX-Video or PixArt",
    "transformer.transformer_blocks.0.attn.to_x.lora_A.weight": "name nothing in FLUX.1 or FLUX.2",
    "something.else.lora_A.weight": "choose a LoRA file of FLUX.1 or FLUX.2",
}  # fmt: skip


@pytest.mark.parametrize("key", [*REASONS, *TEXTS])
@pytest.mark.parametrize("beside", [False, True])
def test_what_is_not_read_is_named_for_what_it_is(key: str, beside: bool, tmp_path: Path) -> None:
    good = drawn({Q: f"transformer.{Q}"}, "lora_B.weight", "lora_A.weight") if beside else {}
    save_file(good | {key: torch.ones(2, 2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError) as refused:
        read_pairs(str(tmp_path / "theirs.safetensors"))
    said = str(refused.value)
    wanted = REASONS.get(key, "the text encoder too")
    if beside and wanted.startswith(("checkpoint", "choose")):
        wanted = "name nothing in FLUX.1 or FLUX.2"
    assert wanted in said, said
    if Q in key or B in key or key in TEXTS:  # of ours
        assert "choose a LoRA file of" not in said


def test_every_reason_is_tried() -> None:
    for mark, _ in (*KINDS, *OTHERS):
        assert mark in (r"lora_embedding_",) or any(re.search(mark, key) for key in REASONS), mark


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    state = {}
    for name in ("style", "face"):
        state |= drawn({Q: Q}, f"lora_B.{name}.weight", f"lora_A.{name}.weight")
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"holds several adapters \('face', 'style'\); save the one that is meant"):
        read_pairs(str(tmp_path / "two.safetensors"))


def test_where_no_adapter_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no adapter at owner/name; .*hf download owner/name"):
        find_adapter("owner/name")
    (tmp_path / "loras").mkdir()
    with pytest.raises(ValueError, match=f"there is no adapter at loras/{FILE}; give a .safetensors file or a folder"):
        find_adapter("loras")
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / "loras" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"name one of the files that are there: a\.safetensors, b\.safetensors"):
        find_adapter("loras")
    for content, said in (
        (b"GGUF\3\0\0\0", "it is a GGUF file"),
        (b"\x80\x04\x95abcdef", "it is a pickle"),
        (b"PK\3\4" + b"a" * 9, "it is an archive"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"", "it is empty"),
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=f"is no LoRA file that can be read: {said}"):
            read_pairs("file")
        with pytest.raises(ValueError, match=f"is no adapter that can be read: {said}"):
            read_notes(tmp_path / "file")
    torch.save({"a": torch.ones(2)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="a pickle, which could run programs"):
        read_pairs("lora.pt")


def test_files_that_say_nothing(tmp_path: Path) -> None:
    """Nothing at all, two strengths of one layer, or a strength of zero in every layer."""
    good = drawn({Q: f"transformer.{Q}"}, "lora_B.weight", "lora_A.weight")
    alpha = f"transformer.{Q}.alpha"
    for state, said in (
        ({}, "holds no tensor: it was saved empty"),
        (good | {alpha: torch.ones(2)}, r"has an alpha of the shape \[2\] in .*one number says"),
        (good | {alpha: torch.zeros(())}, "is zero in every layer: it would draw the base model"),
    ):
        save_file(state, tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match=said):
            read_pairs(str(tmp_path / "file.safetensors"))
    save_file(good | {alpha: torch.full((1, 1), 2.0)}, tmp_path / "file.safetensors")
    (pair,) = read_pairs(str(tmp_path / "file.safetensors")).values()
    assert pair.strength == 2 / pair.down.shape[0]
