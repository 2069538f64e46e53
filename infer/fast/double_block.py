"""A block of two streams, text and image, that attend to each other; FLUX.1's and FLUX.2's differ within their MLPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infer.fast.blocks import attention, linear, modulated, rms_norm, rotate
from infer.fast.weights import Linear


class Double(NamedTuple):
    """The parts of a block of two streams; txt before img as in the joint attention."""

    heads: int
    norms: tuple[Tensor, Tensor, Tensor, Tensor]  # of txt's q and k, of img's q and k
    qkv: tuple[Linear, Linear]
    out: tuple[Linear, Linear]
    up: tuple[Linear, Linear]
    down: tuple[Linear, Linear]
    mod: tuple[Linear, ...] = ()  # of its own; FLUX.2's blocks share theirs
    repeatable: bool = False  # whether the attention's gradient is the same every time


def norms_of(attn: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norms' weights of diffusers' attention of two streams, as Double has them."""
    return attn.norm_added_q.weight, attn.norm_added_k.weight, attn.norm_q.weight, attn.norm_k.weight


def double_block(
    activation: Callable[[Tensor], Tensor],
    block: Double,
    txt: Tensor,
    img: Tensor,
    txt_mod: Tensor,
    img_mod: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """txt and img [batch, tokens, width]; each stream's modulation [batch, 6 * width]; activation: within the MLPs."""
    mods = [mod.chunk(6, dim=-1) for mod in (txt_mod, img_mod)]
    streams = [txt, img]
    parts = []
    for i, x in enumerate(streams):
        q, k, v = linear(modulated(x, mods[i][0], mods[i][1]), block.qkv[i])
        q, k, v = (y.unflatten(-1, (block.heads, -1)) for y in (q, k, v))
        parts.append((rms_norm(q, block.norms[2 * i]), rms_norm(k, block.norms[2 * i + 1]), v))
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
    joint = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, block.qkv[0].frozen.half, block.repeatable)
    for i, attended in enumerate(joint.split([txt.shape[1], img.shape[1]], dim=1)):
        _, _, gate, shift, scale, gate_mlp = mods[i]
        x = streams[i] + gate[:, None] * linear(attended, block.out[i])[0]
        hidden = activation(linear(modulated(x, shift, scale), block.up[i])[0])
        streams[i] = x + gate_mlp[:, None] * linear(hidden, block.down[i])[0]
    return streams[0], streams[1]
