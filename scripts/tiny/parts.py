"""The untrained parts of the bundled model: FLUX.1-dev's classes with small sizes, all multiples of 64.

Two tokenizers know the small world's words and spell out every other one, so that a trigger word is never lost.
"""

import string
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.configuration_utils import FrozenDict
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from scripts.tiny import world

TEXT_TOKENS = 40


def words() -> list[str]:
    """Every word a caption of the small world may hold, and a few that users are likely to add."""
    phrases = [*world.SHAPES, *map(world.plural, world.SHAPES), *world.COLOURS, *world.BACKGROUNDS, *world.TEXTURES]
    phrases += [*world.COUNTS.values(), *world.PLACES, *world.SIZES]
    phrases += ["a an the of and with in on to", "left right above below", "background picture drawing style"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: the world's words, else single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words()]
    pieces += [(c, -8.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def byte_pairs(split: list[list[str]]) -> list[tuple[str, str]]:
    """Merges that make one piece of every word (Sennrich et al. 2016), ties broken by the alphabet: the trainer of
    `tokenizers` breaks them differently on each machine. The words are given as their first pieces, and merged."""
    merges = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in split:
            for i in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[i : i + 2]) == best:
                    pieces[i : i + 2] = ["".join(best)]
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """Byte pairs with end-of-word marks, merged into the world's words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = byte_pairs([[*word[:-1], f"{word[-1]}</w>"] for word in words()])
    pieces = alphabet + [f"{c}</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    pieces = [*list(dict.fromkeys(pieces)), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=TEXT_TOKENS,
    )


def tokenizers() -> tuple[T5TokenizerFast, CLIPTokenizer]:
    return t5_tokenizer(), clip_tokenizer()


def regrown(fresh: Any, old: Any, pieces: dict[str, int], known: dict[str, int]) -> Any:
    """The text encoder `fresh` with what `old` has learned: all of its layers, and the pieces that both know.

    pieces, known: their tokenizers' pieces with their ids. What the world has got new words for begins untrained.
    """
    shared = [piece for piece in pieces if piece in known]
    here, there = ([ids[piece] for piece in shared] for ids in (pieces, known))
    state, learned = fresh.state_dict(), old.state_dict()
    for name, value in state.items():
        if name.endswith(("shared.weight", "embed_tokens.weight", "token_embedding.weight", "lm_head.weight")):
            value[here] = learned[name][there].to(value.dtype)
        else:
            value.copy_(learned[name])
    fresh.load_state_dict(state)
    return fresh


def loaded(cls: Any, folder: Path) -> Any:
    """A part of a checkpoint in fp32, to be trained on, an autoencoder for the world's present size.

    It forgets its folder, which its config would tell everyone.
    """
    part = cls.from_pretrained(folder).float()
    part._internal_dict = FrozenDict({key: value for key, value in part.config.items() if key != "_name_or_path"})
    if "sample_size" in part.config and "latent_channels" in part.config:
        part.register_to_config(sample_size=world.SIZE)
    return part


def t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=64,
            num_heads=2,
            d_ff=256,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,  # small groups lose absolute colour: two channels a group are but a sign
        sample_size=world.SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def transformer() -> FluxTransformer2DModel:
    """2 double and 4 single blocks of width 256; modulation and output start at zero (adaLN-zero, Peebles 2023)."""
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm" in name or name.startswith(("norm_out", "proj_out"))):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's own settings."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
