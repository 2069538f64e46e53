"""The untrained parts of the bundled FLUX.2: klein's classes with small sizes."""

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from scripts.tiny import parts, world

TEXT_TOKENS = 48  # the chat template's 12 with them
WIDTH = 64  # of the text encoder
LAYERS = (9, 18, 27)  # whose outputs the transformer reads
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """Byte pairs, merged into the world's words with the space before them, and the words of the chat template."""
    words = [f"Ġ{word}" for word in parts.words()]
    words += ["user", "assistant", "ĊĊ", "a", "two", "three", "four", "on"]
    merges = parts.byte_pairs([list(word) for word in words])
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), *SPECIAL]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        additional_special_tokens=SPECIAL[1:],
        model_max_length=TEXT_TOKENS,
        chat_template=TEMPLATE,
    )


def text_encoder(reader: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """28 layers, as klein's; the last and the head are read by nobody."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(reader),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.1,
            pad_token_id=reader.pad_token_id,
            eos_token_id=reader.eos_token_id,
        )
    )


def transformer() -> Flux2Transformer2DModel:
    """1 double and 4 single blocks of width 192; modulation and output start at zero (adaLN-zero, Peebles 2023)."""
    model = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=len(LAYERS) * WIDTH,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("modulation" in name or name.startswith(("norm_out", "proj_out"))):
            torch.nn.init.zeros_(module.weight)
    return model


def vae(first: AutoencoderKL) -> AutoencoderKLFlux2:
    """FLUX.1's trained autoencoder with twice the channels; the new ones begin without a say."""
    config = first.config
    model = AutoencoderKLFlux2(
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=32,
        norm_num_groups=config.norm_num_groups,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    state, old = model.state_dict(), first.state_dict()
    for name, value in old.items():
        if state[name].shape == value.shape:
            state[name] = value
    half = config.latent_channels
    for part, start in (("weight", 0.1), ("bias", 0.0)):
        name = f"encoder.conv_out.{part}"
        mean, variance = old[name].chunk(2)
        fresh_mean, fresh_variance = state[name].chunk(2)
        fresh_variance = fresh_variance * start - (3.0 if part == "bias" else 0.0)
        state[name] = torch.cat([mean, fresh_mean[half:], variance, fresh_variance[half:]])
    name = "decoder.conv_in.weight"
    state[name] = torch.cat([old[name], state[name][:, half:] * 0.1], 1)
    model.load_state_dict(state)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """klein's own settings."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
