"""FLUX.1: dev, schnell, Kontext and what was made of them. The members are explained in family.py.

Sources of the names: black-forest-labs/flux `model.py`, XLabs-AI/x-flux `layers.py`, and diffusers'
`convert_flux_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from infer.family.family import Activations, Drawing, Encoder, LatentMap, Linear, Names, Text, TextSize
from infer.family.flux1_sizes import SIZES as SIZES
from infer.family.packing import pack
from infer.family.stacks import in_stacks
from infer.family.stacks import norm_sizes as norm_sizes

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

NAME, TAG = "FLUX.1", "flux"
PIPELINES: Mapping[str, str] = {
    "FluxPipeline": "",
    "FluxKontextPipeline": "",
    "FluxFillPipeline": "it takes a mask and a masked picture in further channels, which nothing here gives it",
    "FluxControlPipeline": "it takes a control picture in further channels, which nothing here gives it",
    "FluxPriorReduxPipeline": "it makes embeddings of pictures and draws none",
}
TRANSFORMER, AUTOENCODER = "FluxTransformer2DModel", "AutoencoderKL"
PARTS: tuple[str, ...] = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "transformer",
    "vae",
)
ENCODERS: tuple[Encoder, ...] = (
    Encoder("text_encoder", "tokenizer", False),
    Encoder("text_encoder_2", "tokenizer_2", True),
)
INDEXED = False
AXES: tuple[int, ...] = (16, 56, 56)
BIAS = SAMPLED = True
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
MLP = r"(ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
NAMES = Names(
    double={
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    single={
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
    outside={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    swapped="final_layer.adaLN_modulation.1",
    ai_toolkit=False,
    double_also={  # XLabs
        "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "processor.proj_lora1": ("attn.to_out.0",),
        "processor.proj_lora2": ("attn.to_add_out",),
    },
    single_also={
        "processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "processor.proj_lora": ("proj_out",),
    },
)
FILE_MARKS: Mapping[str, str] = {
    "text_encoder": "embeddings.token_embedding.weight",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "decoder.conv_in.weight",
}
GGUF_TEXT: Mapping[str, str] = {"t5encoder": "text_encoder_2", "t5": "text_encoder_2"}
TOKENS: Mapping[str, int] = {"black-forest-labs/FLUX.1-schnell": 256} | {
    path: 512 for path in SIZES if not path.endswith("schnell")
}
_OWN: tuple[str, str | None] = "other", "flux-1-dev-non-commercial-license"
LICENCES: Mapping[str, tuple[str, str | None]] = dict.fromkeys(SIZES, _OWN) | {
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None)
}
ACTIVATIONS = Activations(25.5, 48.0, 103.0, 7.0, 11.5, 1.05)
TIME = 256  # sines of a timestep, or of a guidance, that are embedded
GUIDANCE = {"black-forest-labs/FLUX.1-Kontext-dev": 2.5, "black-forest-labs/FLUX.1-Krea-dev": 4.5}  # their model cards


def linear_shapes(config: Mapping[str, Any]) -> dict[str, Linear]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = config["in_channels"]
    embedders = {"timestep": TIME, "text": config["pooled_projection_dim"]}
    if config.get("guidance_embeds"):
        embedders["guidance"] = TIME
    layers = {
        "x_embedder": Linear(width, channels),
        "context_embedder": Linear(width, config["joint_attention_dim"]),
        "norm_out.linear": Linear(2 * width, width),
        "proj_out": Linear(config.get("patch_size", 1) ** 2 * (config.get("out_channels") or channels), width),
    }
    for name, given in embedders.items():
        layers[f"time_text_embed.{name}_embedder.linear_1"] = Linear(width, given)
        layers[f"time_text_embed.{name}_embedder.linear_2"] = Linear(width, width)
    square = [layer for name, part in NAMES.double.items() if "attn" in name for layer in part]
    double = {name: Linear(width, width) for name in square}
    for norm, mlp in (("norm1", "ff"), ("norm1_context", "ff_context")):
        double[f"{norm}.linear"] = Linear(6 * width, width)
        double[f"{mlp}.net.0.proj"] = Linear(4 * width, width)
        double[f"{mlp}.net.2"] = Linear(width, 4 * width)
    single = {name: Linear(width, width) for name in NAMES.double["img_attn.qkv"]}
    single |= {
        "norm.linear": Linear(3 * width, width),
        "proj_mlp": Linear(4 * width, width),
        "proj_out": Linear(width, 5 * width),
    }
    return layers | in_stacks(config, double, single)


def drawing(path: str, index: Mapping[str, Any], config: Mapping[str, Any]) -> Drawing:
    guidance = GUIDANCE["black-forest-labs/FLUX.1-Kontext-dev"] if "Kontext" in index.get("_class_name", "") else 3.5
    steps = 28 if config.get("guidance_embeds") else 4
    return Drawing(steps, GUIDANCE.get(path, guidance))


def unguided(index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    if config.get("guidance_embeds"):
        return None
    return "it has no guidance embedding, as schnell has none"


def two_calls(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return False


def distilled_from(path: str, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """None: schnell and its kin can be trained for a few steps (see `training_note`)."""
    return None


def distilled_to(index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """None: schnell's adapters are its own."""
    return None


def training_note(config: Mapping[str, Any]) -> str | None:
    if config.get("guidance_embeds"):
        return None
    return (
        "has no guidance embedding (schnell and its kin): an adapter trained on it undoes the few-step distillation "
        "with time; train few steps, or on FLUX.1-dev"
    )


def text_class(part: str, config: dict[str, Any], whole: bool) -> tuple[Any, Any]:
    import transformers

    return (transformers.CLIPTextModel if part == "text_encoder" else transformers.T5EncoderModel), None


def text_size(part: str, config: Mapping[str, Any]) -> TextSize:
    """transformers keeps T5's `wo` layers as they are."""
    if part == "text_encoder":
        width, hidden = config["hidden_size"], config["intermediate_size"]
        weights = config["num_hidden_layers"] * (4 * width**2 + 2 * width * hidden)
        return TextSize([], weights + (config["vocab_size"] + config["max_position_embeddings"]) * width, 0)
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    block = [Linear(inner, width)] * 4 + [Linear(hidden, width)] * 2
    blocks = config["num_layers"]
    return TextSize(block * blocks, config["vocab_size"] * width, blocks * width * hidden)


def embeds_width(config: Mapping[str, Any]) -> int:
    return int(config["d_model"])


def text_body(encoder: Any) -> Any:
    return encoder


def text_length(parts: Mapping[str, Any]) -> int:
    return int(parts["tokenizer_2"].model_max_length)


def make_encoder(parts: Mapping[str, Any], length: int) -> Callable[[str], Text]:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)

    def encode(prompt: str) -> Text:
        embeds, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=length)
        return Text(embeds[0], pooled[0])

    return encode


def count_tokens(parts: Mapping[str, Any], prompts: list[str]) -> list[int]:
    return [len(ids) for ids in parts["tokenizer_2"](prompts, verbose=False).input_ids]


def latent_map(config: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> LatentMap:
    values = [config.get(name) for name in ("shift_factor", "scaling_factor")]
    for name, value in zip(("shift_factor", "scaling_factor"), values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"has {name}={value!r} where a number belongs")
    return LatentMap(*map(float, values))  # type: ignore[arg-type]


def takes_references(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") == "FluxKontextPipeline"


def reference_pixels(picture: Image.Image, resolution: int | None) -> Tensor:
    """Of FluxKontextPipeline's sizes the one whose shape is nearest; at another resolution these sizes scaled."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    processor = VaeImageProcessor(vae_scale_factor=16)
    rows, columns = processor.get_default_height_width(picture)  # cut to multiples of 16, as the pipeline does first
    shape = columns / max(rows, 16)
    _, *preferred = min((abs(shape - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    width, height = (max(16, side * (resolution or 1024) // 1024 // 16 * 16) for side in preferred)
    pixels: Tensor = processor.preprocess(processor.resize(picture, height, width), height, width)
    return pixels


@cache  # all of them: captured graphs read them where they are
def image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype, picture: int = 0) -> Tensor:
    """Position ids of the packed latents of a picture of height x width latents, [tokens, 3]; do not write to them.

    picture: 0 for the one that is drawn, and from 1 on its references; Kontext was trained with one.
    """
    from diffusers import FluxPipeline

    ids: Tensor = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, dtype)
    ids[:, 0] = picture
    return ids


def inputs(
    config: Mapping[str, Any],
    packed: Tensor,
    height: int,
    width: int,
    embeds: Tensor,
    pooled: Tensor | None,
    guidance: float,
    dtype: torch.dtype,
    references: Sequence[Tensor] = (),
) -> dict[str, Any]:
    import torch

    assert pooled is not None
    device = packed.device
    ids = image_ids(height, width, device, dtype)
    if references:
        packed = torch.cat([packed, *map(pack, references)], dim=1)
        sizes = (each.shape[-2:] for each in references)
        ids = torch.cat([ids, *(image_ids(*size, device, dtype, i) for i, size in enumerate(sizes, start=1))])
    return {
        "hidden_states": packed.to(dtype),
        "encoder_hidden_states": embeds.to(dtype),
        "pooled_projections": pooled.to(dtype),
        "guidance": torch.full((len(packed),), guidance, device=device) if config["guidance_embeds"] else None,
        "img_ids": ids,
        "txt_ids": torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
    }


def mu(scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return float(calculate_shift(tokens, *(scheduler.get(name, default) for name, default in names.items())))
