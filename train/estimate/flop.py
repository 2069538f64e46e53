"""Floating-point operations of FLUX's transformer. With a card's rate they bound the time of a step from below."""

from typing import Any

from infer.checkpoint.layers import linear_shapes

RECOMPUTED = 0.6  # of a block's products, where it is computed again: no gradient reads the value of the last one


def width_of(config: dict[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def linear_flop(config: dict[str, Any], tokens: int) -> float:
    """Operations of the blocks' linear layers in one forward pass of one sample: 2 for each weight and token.

    config: the transformer's.
    """
    return 2.0 * tokens * token_weights(config)


def token_weights(config: dict[str, Any]) -> float:
    """Weights of the blocks' linear layers that one token passes. In a double block, text and picture tokens each pass
    one half of them. Modulation layers act on one vector and cost next to nothing."""
    layers = {name: each.rows * each.columns for name, each in linear_shapes(config).items() if ".norm" not in name}
    double = sum(count for name, count in layers.items() if name.startswith("transformer_blocks."))
    return double / 2 + sum(count for name, count in layers.items() if name.startswith("single_transformer_blocks."))


def attention_flop(config: dict[str, Any], tokens: int) -> float:
    """Operations of attention's two products, q k^T and weights times v, in one forward pass of one sample."""
    flop: float = 4.0 * tokens**2 * (config["num_layers"] + config["num_single_layers"]) * width_of(config)
    return flop


def tokens_of(pixels: int, text: int) -> int:
    """Tokens of a sample: the picture's packed latents, 16 x 16 pixels each, and the text's."""
    return pixels // 256 + text


def step_flop(config: dict[str, Any], pixels: int, text: int, recomputed: bool, kept: bool = False) -> float:
    """Operations of one training step of one sample with frozen weights.

    They are those of the forward pass and of the gradient of every input, which is two and a half forward passes for
    attention, whose backward computes q k^T again.

    Args:
        recomputed: the blocks are computed once more in the backward pass, but for their last products.
        kept: attention's outputs are kept, and not computed once more.
    """
    tokens = tokens_of(pixels, text)
    linear, attention = linear_flop(config, tokens), attention_flop(config, tokens)
    return (2 + RECOMPUTED * recomputed) * linear + (4.5 if recomputed and not kept else 3.5) * attention
