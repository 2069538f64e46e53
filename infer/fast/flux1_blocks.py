"""FLUX.1's blocks for the fast path: each has modulations of its own, and a GELU in its MLP."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.blocks import attention, linear, modulated, modulation, rms_norm, rotate
from infer.fast.double_block import Double, double_block, norms_of
from infer.fast.form import Form, Outside, last_norm
from infer.fast.group import Group
from infer.fast.weights import Linear

gelu = partial(functional.gelu, approximate="tanh")


def _read_double(block: Any, apart: bool) -> tuple[list[Group], Callable[[int], Double]]:
    mod = Group(block, "norm1_context.linear"), Group(block, "norm1.linear")
    txt_qkv = Group(block, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    qkv = txt_qkv, Group(block, "attn.to_q", "attn.to_k", "attn.to_v")
    out = Group(block, "attn.to_add_out"), Group(block, "attn.to_out.0")
    up = Group(block, "ff_context.net.0.proj"), Group(block, "ff.net.0.proj")
    down = Group(block, "ff_context.net.2"), Group(block, "ff.net.2")
    pairs = mod, qkv, out, up, down

    def parts(heads: int) -> Double:
        mods, qkvs, outs, ups, downs = ((a.linear(), b.linear()) for a, b in pairs)
        return Double(heads, norms_of(block.attn), qkvs, outs, ups, downs, mods)

    return [group for pair in pairs for group in pair], parts


class Single(NamedTuple):
    """A block of one stream, txt and img behind each other."""

    heads: int
    norms: tuple[Tensor, Tensor]  # of q and k
    mod: Linear
    reads: tuple[Linear, ...]  # q, k, v and the MLP's up, in one stack or in several
    down: Linear
    repeatable: bool = False  # whether the attention's gradient is the same every time


def _read_single(block: Any, apart: bool) -> tuple[list[Group], Callable[[int], Single]]:
    """apart: one product for q, k and v and one for the MLP; of all weights 5/7 are dequantized at once at most."""
    attn = block.attn
    mod, down = Group(block, "norm.linear"), Group(block, "proj_out")
    qkv, up = ("attn.to_q", "attn.to_k", "attn.to_v"), ("proj_mlp",)
    reads = [Group(block, *qkv), Group(block, *up)] if apart else [Group(block, *qkv, *up)]

    def parts(heads: int) -> Single:
        norms = attn.norm_q.weight, attn.norm_k.weight
        return Single(heads, norms, mod.linear(), tuple(each.linear() for each in reads), down.linear())

    return [mod, *reads, down], parts


def single_block(
    block: Single, txt: Tensor, img: Tensor, mod: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """txt and img [batch, tokens, width]; their common modulation [batch, 3 * width]."""
    x = torch.cat([txt, img], dim=1)
    shift, scale, gate = mod.chunk(3, dim=-1)
    normed = modulated(x, shift, scale)
    q, k, v, hidden = (y for layers in block.reads for y in linear(normed, layers))
    q, k, v = (y.unflatten(-1, (block.heads, -1)) for y in (q, k, v))
    q, k = rms_norm(q, block.norms[0]), rms_norm(k, block.norms[1])
    attended = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, block.down.frozen.half, block.repeatable)
    y = linear(torch.cat([attended, gelu(hidden)], dim=-1), block.down)[0]
    txt, img = (x + gate[:, None] * y).split([txt.shape[1], img.shape[1]], dim=1)
    # of a batch of one, parts are contiguous already, as views that the next block would be compiled for apart
    return txt.clone(memory_format=torch.contiguous_format), img.clone(memory_format=torch.contiguous_format)


def _arguments(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (encoder_hidden_states, hidden_states), (temb, *image_rotary_emb)


def _double(again: Any, block: Double, txt: Tensor, img: Tensor, temb: Any, cos: Tensor, sin: Tensor) -> Any:
    return again(partial(double_block, gelu), block, txt, img, *_modulations(temb, *block.mod), cos, sin)


def _single(again: Any, block: Single, txt: Tensor, img: Tensor, temb: Any, cos: Tensor, sin: Tensor) -> Any:
    return again(single_block, block, txt, img, *_modulations(temb, block.mod), cos, sin)


def _modulations(temb: Tensor | tuple[Tensor, ...], *layers: Linear) -> tuple[Tensor, ...]:
    """Each layer's output [batch, out] for the conditioning vectors [batch, width]; a tuple holds the outputs."""
    if isinstance(temb, tuple):
        return temb
    condition = functional.silu(temb)
    return tuple(modulation(condition, layer) for layer in layers)


def _embed(transformer: Any, timesteps: Tensor, guidance: Tensor | None, pooled: Tensor | None) -> Tensor:
    assert pooled is not None
    times = [timesteps * 1000]
    if guidance is not None:
        times.append((guidance.to(timesteps.dtype) * 1000).expand(len(timesteps)))
    temb: Tensor = transformer.time_text_embed(*times, pooled.expand(len(timesteps), -1))
    return temb


def _velocity(
    transformer: Any, img: Tensor, txt: Tensor, modulations: Sequence[Tensor], rotary: tuple[Tensor, Tensor]
) -> Tensor:
    img, *left = transformer.x_embedder(img), *modulations
    for block in transformer.transformer_blocks:
        own, left = left[:2], left[2:]
        txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=tuple(own), image_rotary_emb=rotary)
    for block in transformer.single_transformer_blocks:
        own, left = left[:1], left[1:]
        txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=tuple(own), image_rotary_emb=rotary)
    return last_norm(transformer, img, *left)


FORMS = (
    Form("transformer_blocks", _read_double, _arguments, _double),
    Form("single_transformer_blocks", _read_single, _arguments, _single),
)
OUTSIDE = Outside(_embed, ("norm_out.linear",), _velocity)
