"""FLUX.1's architecture at full size with random weights: true memory and true speed, no licence and no download.

Each part is made on the meta device and filled there layer by layer, so that a quantized model never needs its bf16
weights in memory. The sizes are those of the published checkpoints (black-forest-labs/FLUX.1-dev, config.json of each
part). Pictures drawn with it are noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from infer.quantize.precision import Precision

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from torch import Tensor, nn

DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "eos_token_id": 1,  # the byte tokenizer's, at which CLIP's pooled output is read
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}
SCHNELL = DEV | {
    "transformer": DEV["transformer"] | {"guidance_embeds": False},
    "scheduler": DEV["scheduler"] | {"shift": 1.0, "use_dynamic_shifting": False},
}
SHAPES = {"black-forest-labs/FLUX.1-dev": DEV, "black-forest-labs/FLUX.1-schnell": SCHNELL}
TEXT_TOKENS = {"black-forest-labs/FLUX.1-dev": 512, "black-forest-labs/FLUX.1-schnell": 256}


def shape_config(path: str, part: str) -> dict[str, Any]:
    """A part's config.

    Raises:
        ValueError: the sizes of this model are not known here.
    """
    if path not in SHAPES:
        raise ValueError(f"model.weights=random knows the sizes of {', '.join(SHAPES)}, not of {path!r}; choose one")
    return SHAPES[path][part]


def shape_fingerprint(path: str, part: str) -> str:
    """In place of a hash of the weights: they follow from the config."""
    config = {} if part.startswith("tokenizer") else shape_config(path, part)
    return hashlib.sha256(f"random {part} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()


def random_part(
    path: str, part: str, precision: Precision, device: torch.device, hold: torch.device | None = None
) -> Any:
    """A part with random weights, made and quantized on a device layer by layer and held there or on `hold`.

    The weights depend on the part and the device's kind alone.
    """
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from torch import nn

    config = shape_config(path, part)
    with torch.device("meta"):
        if part == "transformer":
            model: Any = FluxTransformer2DModel(**config)
        elif part == "vae":
            model = AutoencoderKL(**config)
        else:
            import transformers

            if part == "text_encoder":
                model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
            else:
                model = transformers.T5EncoderModel(transformers.T5Config(**config))
    model = nn.Module.to(model, precision.dtype)  # diffusers' own warns of modules that are not there
    _replace_layers(model, part, precision, device, hold or device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, precision, device, hold or device, generator)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, f"{left[0]} was not filled"
    return model


def _replace_layers(
    model: nn.Module, part: str, precision: Precision, device: torch.device, hold: torch.device
) -> None:
    """Linear layers -> bitsandbytes' own, by the libraries' own replacement."""
    if not precision.quantized:
        return
    from infer.quantize.quantizer import LayerQuantizer, quantization_config

    if part == "transformer":
        import diffusers

        quantizer = LayerQuantizer(quantization_config(precision, diffusers), device, hold, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=[])
        model.hf_quantizer = quantizer
        return
    import transformers
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    replace_with_bnb_linear(model, kept, quantization_config(precision, transformers))


def _fill(
    module: nn.Module, precision: Precision, device: torch.device, hold: torch.device, generator: torch.Generator
) -> None:
    """Random values for a module's own meta tensors: layers keep the variance of what they read, norms are ones."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    from infer.quantize.quantizer import held

    for name, old in list(module.named_parameters(recurse=False)):
        if not old.is_meta:
            continue
        if name == "bias" or old.ndim == 1:
            flat = torch.zeros if name == "bias" else torch.ones
            module.register_parameter(name, nn.Parameter(flat(old.shape, dtype=precision.dtype, device=hold), False))
            continue
        fan_in = old.numel() // old.shape[0] if not isinstance(module, nn.Embedding) else 1
        if isinstance(module, nn.Linear):
            fan_in = module.in_features
        value = torch.randn(_full_shape(module, old), dtype=precision.dtype, device=device, generator=generator)
        value /= math.sqrt(fan_in)
        if isinstance(old, bnb.nn.Params4bit):
            new: nn.Parameter = bnb.nn.Params4bit(
                value,
                requires_grad=False,
                blocksize=old.blocksize,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=module,
            ).to(device)
        elif isinstance(old, bnb.nn.Int8Params):
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(value.half())
            new = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        else:
            new = nn.Parameter(value.to(hold), False)
        module.register_parameter(name, held(new, hold))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:  # position ids: the only buffers of these parts
            assert name == "position_ids", f"{name} is no buffer that is known here"
            module.register_buffer(name, torch.arange(buffer.shape[-1], device=hold)[None], persistent=False)


def _full_shape(module: nn.Module, old: Tensor) -> tuple[int, ...]:
    from torch import nn

    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(old.shape)


def shape_tokenizer(path: str, part: str) -> Any:
    """A tokenizer of bytes, which needs no vocabulary: any text gives ids within both encoders' vocabularies."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(model_max_length=77 if part == "tokenizer" else TEXT_TOKENS[path])


def shape_scheduler(path: str) -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**shape_config(path, "scheduler"))
