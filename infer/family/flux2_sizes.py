"""The sizes of FLUX.2's published checkpoints: config.json of each part (black-forest-labs/FLUX.2-klein-base-4B and its
kin; the text encoders are Qwen3-4B, Qwen3-8B and Mistral-Small-3.2-24B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer.family.family import Sizes

_QWEN = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "sliding_window": None,
}
KLEIN: dict[str, dict[str, Any]] = {
    "index": {"_class_name": "Flux2KleinPipeline", "is_distilled": False},
    "transformer": {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "guidance_embeds": False,
        "axes_dims_rope": [32, 32, 32, 32],
        "rope_theta": 2000,
    },
    "vae": {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 32,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "batch_norm_eps": 1e-4,
    },
    "text_encoder": _QWEN,
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
}
KLEIN_9B = KLEIN | {
    "transformer": KLEIN["transformer"]
    | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    "text_encoder": _QWEN | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
DEV = KLEIN | {
    "index": {"_class_name": "Flux2Pipeline"},
    "transformer": KLEIN["transformer"]
    | {
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "guidance_embeds": True,
    },
    # the language model of Mistral 3, without its eyes
    "text_encoder": {"model_type": "mistral3", "text_config": _MISTRAL},
}
_DISTILLED = {"index": KLEIN["index"] | {"is_distilled": True}}
SIZES: Mapping[str, Sizes] = {
    "black-forest-labs/FLUX.2-klein-base-4B": KLEIN,
    "black-forest-labs/FLUX.2-klein-4B": KLEIN | _DISTILLED,
    "black-forest-labs/FLUX.2-klein-base-9B": KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-9B": KLEIN_9B | _DISTILLED,
    "black-forest-labs/FLUX.2-dev": DEV,
}
