"""FLUX.2: klein 4B and 9B, their base and distilled checkpoints, and dev. The members are explained in family.py.

Its transformer has no biases and no pooled text, its modulation is shared by all blocks, and its single blocks have one
layer that reads and one that writes. Its autoencoder's latents are normalised by running means and variances, one of
each for every channel and place in a patch. Sources: black-forest-labs/flux2 `model.py`, and diffusers'
`pipelines/flux2` and `convert_flux2_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from infer.family.family import Activations, Drawing, Encoder, LatentMap, Linear, Names
from infer.family.flux2_sizes import SIZES as SIZES
from infer.family.flux2_text import count_tokens as count_tokens
from infer.family.flux2_text import embeds_width as embeds_width
from infer.family.flux2_text import make_encoder as make_encoder
from infer.family.flux2_text import text_body as text_body
from infer.family.flux2_text import text_class as text_class
from infer.family.flux2_text import text_length as text_length
from infer.family.flux2_text import text_size as text_size
from infer.family.packing import pack
from infer.family.stacks import in_stacks
from infer.family.stacks import norm_sizes as norm_sizes

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

NAME, TAG = "FLUX.2", "flux2"
PIPELINES: Mapping[str, str] = {
    "Flux2KleinPipeline": "",
    "Flux2Pipeline": "",
    "Flux2KleinKVPipeline": "it keeps keys and values of references from step to step, which nothing here does",
}
TRANSFORMER, AUTOENCODER = "Flux2Transformer2DModel", "AutoencoderKLFlux2"
PARTS: tuple[str, ...] = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
ENCODERS: tuple[Encoder, ...] = (Encoder("text_encoder", "tokenizer", True),)
INDEXED = True  # whether klein is distilled
AXES: tuple[int, ...] = (32, 32, 32, 32)
BIAS = SAMPLED = False
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj)"
MLP = r"(ff|ff_context)\.linear_(in|out)"
NAMES = Names(
    double={
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    single={"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    outside={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    swapped="final_layer.adaLN_modulation.1",
    ai_toolkit=True,
    double_also={},
    single_also={},
)
FILE_MARKS: Mapping[str, str] = {"text_encoder": "layers.0.mlp.gate_proj.weight", "vae": "decoder.conv_in.weight"}
GGUF_TEXT: Mapping[str, str] = {"qwen3": "text_encoder"}  # Mistral's comes with permuted rows, as llama's
TOKENS: Mapping[str, int] = dict.fromkeys(SIZES, 512)
_OWN: tuple[str, str | None] = "other", "flux-non-commercial-license"
LICENCES: Mapping[str, tuple[str, str | None]] = {
    path: (("apache-2.0", None) if path.endswith("4B") else _OWN) for path in SIZES
}
ACTIVATIONS = Activations(25.5, 48.0, 103.0, 9.0, 16.1, 0.4)
BASES = {
    "black-forest-labs/FLUX.2-klein-4B": "black-forest-labs/FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.2-klein-9B": "black-forest-labs/FLUX.2-klein-base-9B",
}


def linear_shapes(config: Mapping[str, Any]) -> dict[str, Linear]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels, times = config["in_channels"], config.get("timestep_guidance_channels", 256)
    hidden = int(width * config.get("mlp_ratio", 3.0))
    layers = {
        "x_embedder": Linear(width, channels),
        "context_embedder": Linear(width, config["joint_attention_dim"]),
        "double_stream_modulation_img.linear": Linear(6 * width, width),
        "double_stream_modulation_txt.linear": Linear(6 * width, width),
        "single_stream_modulation.linear": Linear(3 * width, width),
        "norm_out.linear": Linear(2 * width, width),
        "proj_out": Linear(config.get("patch_size", 1) ** 2 * (config.get("out_channels") or channels), width),
    }
    for name in ("timestep", "guidance") if config.get("guidance_embeds", True) else ("timestep",):
        layers[f"time_guidance_embed.{name}_embedder.linear_1"] = Linear(width, times)
        layers[f"time_guidance_embed.{name}_embedder.linear_2"] = Linear(width, width)
    square = [layer for name, part in NAMES.double.items() if "attn" in name for layer in part]
    double = {name: Linear(width, width) for name in square}
    for mlp in ("ff", "ff_context"):
        double[f"{mlp}.linear_in"] = Linear(2 * hidden, width)
        double[f"{mlp}.linear_out"] = Linear(width, hidden)
    single = {
        "attn.to_qkv_mlp_proj": Linear(3 * width + 2 * hidden, width),
        "attn.to_out": Linear(width, width + hidden),
    }
    return layers | in_stacks(config, double, single)


def drawing(path: str, index: Mapping[str, Any], config: Mapping[str, Any]) -> Drawing:
    """As the model cards say; dev and klein's base in fewer steps than the 50 there."""
    return Drawing(4, 1.0) if index.get("is_distilled") else Drawing(28, 4.0)


def unguided(index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    return "it is distilled to draw in few steps without guidance" if index.get("is_distilled") else None


def two_calls(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return not config.get("guidance_embeds", True) and not index.get("is_distilled")


def distilled_from(path: str, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    if not index.get("is_distilled"):
        return None
    size = "4B" if config["num_single_layers"] <= 20 else "9B"
    return BASES.get(path, f"black-forest-labs/FLUX.2-klein-base-{size}")


def distilled_to(index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    if not two_calls(index, config):
        return None
    here = linear_shapes(config)
    fit = (few for few, base in BASES.items() if linear_shapes(SIZES[base]["transformer"]) == here)
    return next(fit, None)


def training_note(config: Mapping[str, Any]) -> str | None:
    return None


def latent_map(config: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> LatentMap:
    mean, variance = (tensor(f"bn.{name}").float() for name in ("running_mean", "running_var"))
    deviation = (variance + config.get("batch_norm_eps", 1e-4)).sqrt()
    return LatentMap(mean.view(-1, 2, 2), (1 / deviation).view(-1, 2, 2))


def takes_references(index: Mapping[str, Any]) -> bool:
    return True


def reference_pixels(picture: Image.Image, resolution: int | None) -> Tensor:
    """At its own size, or scaled down to the resolution's pixels; then its middle, to multiples of 16."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    area = (resolution or 1024) ** 2
    if picture.width * picture.height > area:
        picture = Flux2ImageProcessor._resize_to_target_area(picture, area)
    width, height = (max(16, side // 16 * 16) for side in picture.size)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    pixels: Tensor = processor.preprocess(picture, height=height, width=width, resize_mode="crop")
    return pixels


@cache  # all of them: captured graphs read them where they are
def image_ids(height: int, width: int, device: torch.device, picture: int = 0) -> Tensor:
    """Position ids (time, row, column, word) of the packed latents of a picture of height x width latents, [tokens, 4];
    do not write to them.

    picture: 0 for the one that is drawn, and from 1 on its references, which are 10 apart in time.
    """
    import torch

    time, rows, columns = torch.tensor([10 * picture]), torch.arange(height // 2), torch.arange(width // 2)
    return torch.cartesian_prod(time, rows, columns, torch.arange(1)).to(device)


@cache
def text_ids(tokens: int, device: torch.device) -> Tensor:
    """Position ids of a text's tokens, [tokens, 4]; do not write to them."""
    import torch

    one = torch.arange(1)
    return torch.cartesian_prod(one, one, one, torch.arange(tokens)).to(device)


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

    assert pooled is None
    device = packed.device
    ids = image_ids(height, width, device)
    if references:
        packed = torch.cat([packed, *map(pack, references)], dim=1)
        sizes = (each.shape[-2:] for each in references)
        ids = torch.cat([ids, *(image_ids(*size, device, i) for i, size in enumerate(sizes, start=1))])
    return {
        "hidden_states": packed.to(dtype),
        "encoder_hidden_states": embeds.to(dtype),
        "guidance": torch.full((len(packed),), guidance, device=device) if config["guidance_embeds"] else None,
        "img_ids": ids,
        "txt_ids": text_ids(embeds.shape[1], device),
    }


def mu(scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return float(compute_empirical_mu(tokens, steps))
