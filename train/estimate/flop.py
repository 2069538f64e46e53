"""Floating-point operations of FLUX's transformer: what a step cannot be faster than on a card of a known rate."""

from typing import Any


def width_of(config: dict[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def linear_flop(config: dict[str, Any], tokens: int) -> float:
    """Of the blocks' matrix products in one forward pass of one sample; 2 for each weight that a token meets.

    config: the transformer's. In a double block, text and picture each meet their own half of the weights. Modulation
    layers act on one vector and cost next to nothing.
    """
    width, blocks = width_of(config), config["num_layers"] + config["num_single_layers"]
    flop: float = 2.0 * tokens * blocks * 12 * width**2  # q, k, v, out: 4; the MLP, four times as wide: 8
    return flop


def attention_flop(config: dict[str, Any], tokens: int) -> float:
    """Of the attention products q k^T and their values in one forward pass of one sample."""
    flop: float = 4.0 * tokens**2 * (config["num_layers"] + config["num_single_layers"]) * width_of(config)
    return flop


def tokens_of(pixels: int, text: int) -> int:
    """The packed latents of a picture, 16 x 16 pixels each, and the text tokens."""
    return pixels // 256 + text


def step_flop(config: dict[str, Any], pixels: int, text: int, recomputed: bool, kept: bool = False) -> float:
    """Of one training step of one sample with frozen weights: the forward pass, the gradient of every input (attention:
    two and a half forward passes, since its backward computes q k^T again), and, where the blocks are recomputed, a
    forward pass more; `kept` leaves attention out of that one."""
    tokens = tokens_of(pixels, text)
    linear, attention = linear_flop(config, tokens), attention_flop(config, tokens)
    return (3 if recomputed else 2) * linear + (4.5 if recomputed and not kept else 3.5) * attention
