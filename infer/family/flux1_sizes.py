"""The sizes of FLUX.1's published checkpoints: config.json of each part (black-forest-labs/FLUX.1-dev and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer.family.family import Sizes

DEV: dict[str, dict[str, Any]] = {
    "index": {"_class_name": "FluxPipeline"},
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
KONTEXT = DEV | {"index": {"_class_name": "FluxKontextPipeline"}}
SIZES: Mapping[str, Sizes] = {
    "black-forest-labs/FLUX.1-dev": DEV,
    "black-forest-labs/FLUX.1-schnell": SCHNELL,
    "black-forest-labs/FLUX.1-Kontext-dev": KONTEXT,
    "black-forest-labs/FLUX.1-Krea-dev": DEV,
}
