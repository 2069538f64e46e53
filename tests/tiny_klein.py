"""A random tiny FLUX.2 klein, made on the spot as a diffusers folder: python tests/tiny_klein.py FOLDER

Real in all but size: a Qwen3 encoder of 28 layers, of which hidden states 9, 18 and 27 are read, a byte-level tokenizer
with a chat template, and an autoencoder whose latents are normalised by a batch norm's running figures.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.tiny.klein_parts import SPECIAL, TEMPLATE

WIDTH = 64  # of the text encoder


def make_klein(folder: Path, distilled: bool = False) -> Path:
    """Write the checkpoint; returns its folder."""
    torch.manual_seed(0)
    vocab = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], additional_special_tokens=SPECIAL[1:], model_max_length=512, chat_template=TEMPLATE
    )
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=28,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=128,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:  # norms
                parameter.uniform_(0.5, 1.5)
            if "modulation" in name:  # gates near 0 would leave little of what the blocks do
                parameter.mul_(10)
        autoencoder.bn.running_mean.normal_(0, 0.1)
        autoencoder.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipeline = Flux2KleinPipeline(
        scheduler=scheduler,
        vae=autoencoder.bfloat16(),
        text_encoder=encoder.bfloat16(),
        tokenizer=tokenizer,
        transformer=transformer.bfloat16(),
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    make_klein(Path(sys.argv[1]))
