"""Single files as others write them, made of a diffusers checkpoint: by hand from the published layouts, not from the
tables that the toolkit reads them with."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.loaders import single_file_utils as library
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def part(model: str, name: str) -> Weights:
    """The tensors of a part, of all its files."""
    found: Weights = {}
    for file in sorted(Path(model, name).glob("*.safetensors")):
        found |= load_file(file)
    return found


def swapped(value: Tensor) -> Tensor:
    scale, shift = value.chunk(2)
    return torch.cat([shift, scale])


def original(weights: Weights) -> Weights:
    """A transformer with Black Forest Labs' names."""
    found: Weights = {}
    flux2 = "double_stream_modulation_img.linear.weight" in weights
    time = "time_guidance_embed" if flux2 else "time_text_embed"
    outside = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        f"{time}.timestep_embedder.linear_1": "time_in.in_layer",
        f"{time}.timestep_embedder.linear_2": "time_in.out_layer",
        f"{time}.text_embedder.linear_1": "vector_in.in_layer",
        f"{time}.text_embedder.linear_2": "vector_in.out_layer",
        f"{time}.guidance_embedder.linear_1": "guidance_in.in_layer",
        f"{time}.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    within = {
        "transformer_blocks": {
            "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "ff.linear_in": "img_mlp.0",
            "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
            "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
            "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
        },
        "single_transformer_blocks": {
            "norm.linear": "modulation.lin", "proj_out": "linear2", "attn.to_qkv_mlp_proj": "linear1",
            "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm",
        },
    }  # fmt: skip
    groups = [
              ("transformer_blocks", "img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
              ("transformer_blocks", "txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
              ("single_transformer_blocks", "linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ]  # fmt: skip
    for name, value in weights.items():
        layer, end = name.rsplit(".", 1)
        block = re.match(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)", layer)
        if layer == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{end}"] = swapped(value)
        elif block is None:
            found[f"{outside[layer]}.{end}"] = value
        else:
            stack = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}[block[1]]
            for owner, whole, layers in groups:
                if owner == block[1] and block[3] in layers:
                    if block[3] == layers[0]:
                        parts = [weights[f"{owner}.{block[2]}.{each}.{end}"] for each in layers]
                        found[f"{stack}.{block[2]}.{whole}.{end}"] = torch.cat(parts)
                    break
            else:
                own = within[block[1]][block[3]]
                found[f"{stack}.{block[2]}.{own}.{'scale' if '.norm.' in f'.{own}' else end}"] = value
    return found


def converted(file: Path, width: int) -> Weights:
    """A file with Black Forest Labs' names by diffusers' own converter, of which FLUX.1's knows one width alone."""
    weights = load_file(file)
    if "double_stream_modulation_img.lin.weight" in weights:
        found: Weights = library.convert_flux2_transformer_checkpoint_to_diffusers(weights)
        return found
    source = inspect.getsource(library.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    names: dict[str, Callable[[Weights], Weights]] = {}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), vars(library) | {"__name__": "x"}, names)
    return names["convert_flux_transformer_checkpoint_to_diffusers"](weights)


def fp8(weights: Weights, scaled: str = "", rows: bool = False, kind: torch.dtype = torch.float8_e4m3fn) -> Weights:
    """The matrices in fp8, as they are, or with a scale of this name beside them: one, or one a row."""
    found: Weights = {}
    for name, value in weights.items():
        if value.ndim != 2 or not name.endswith(".weight"):
            found[name] = value
        elif not scaled:
            found[name] = value.to(kind)
        else:
            most = value.float().abs().amax(1, keepdim=True) if rows else value.float().abs().max()
            scale = most / 448
            found[name] = (value.float() / scale).to(kind)
            found[name.removesuffix("weight") + scaled] = scale
    return found


def gguf_file(file: Path, weights: Weights, kind: str, architecture: str = "flux") -> Path:
    """The matrices in a GGUF's kind, all else in fp32, as ComfyUI-GGUF's converter has them."""
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, value in weights.items():
        whole = value.float().numpy()
        if whole.ndim == 2 and whole.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(whole, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, np.ascontiguousarray(whole))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return file


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def saved(file: Path, weights: Weights) -> Path:
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    return file


def original_autoencoder(weights: Weights) -> Weights:
    """An autoencoder with Black Forest Labs' names: its decoder's blocks are counted from the other end, and what
    attends are convolutions of one pixel."""
    found: Weights = {}
    for name, value in weights.items():
        if name.startswith("bn."):
            found[name] = value
            continue
        own = name.replace("post_quant_conv", "decoder.post_quant_conv") if name.startswith("post") else name
        own = own.replace("quant_conv", "encoder.quant_conv") if name.startswith("quant") else own
        own = own.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        own = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", own)
        own = own.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            own = own.replace(f"attn_1.{theirs}", f"attn_1.{ours}")
        own = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", own)
        own = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", own)
        own = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", own)
        own = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", own)
        found[own] = value[:, :, None, None] if "attn_1" in own and value.ndim == 2 else value
    return found


def llama_cpp(weights: Weights) -> Weights:
    """T5's or Qwen3's encoder with the names that llama.cpp gives them."""
    t5 = [
        ("shared.", "token_embd."), ("encoder.final_layer_norm", "enc.output_norm"), ("encoder.block.", "enc.blk."),
        (".layer.0.SelfAttention.relative_attention_bias", ".attn_rel_b"), (".layer.0.SelfAttention.", ".attn_"),
        (".layer.0.layer_norm", ".attn_norm"), (".layer.1.layer_norm", ".ffn_norm"),
        (".layer.1.DenseReluDense.wi_0", ".ffn_gate"), (".layer.1.DenseReluDense.wi_1", ".ffn_up"),
        (".layer.1.DenseReluDense.wo", ".ffn_down"),
    ]  # fmt: skip
    qwen = [
        ("model.", ""), ("embed_tokens", "token_embd"), ("layers.", "blk."), ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ]  # fmt: skip
    found: Weights = {}
    for name, value in weights.items():
        own = name
        for theirs, ours in t5 if "shared.weight" in weights else qwen:
            own = own.replace(theirs, ours)
        found["output_norm.weight" if own == "norm.weight" else own] = value
    return found
