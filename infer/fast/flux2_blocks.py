"""FLUX.2's blocks for the fast path: modulations that the transformer computes once for all of them, SwiGLU, no biases.

A single block reads its input by one layer, for q, k, v and both halves of the MLP, and writes by another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.blocks import attention, linear, modulated, rms_norm, rotate
from infer.fast.double_block import Double, double_block, norms_of
from infer.fast.form import Form, Outside, last_norm
from infer.fast.group import Group
from infer.fast.weights import Linear, can_cut, rows_of


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2 * width] -> [..., width], the first half the gate (Shazeer 2020, as diffusers' Flux2SwiGLU)."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _read_double(block: Any, apart: bool) -> tuple[list[Group], Callable[[int], Double]]:
    txt_qkv = Group(block, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    qkv = txt_qkv, Group(block, "attn.to_q", "attn.to_k", "attn.to_v")
    out = Group(block, "attn.to_add_out"), Group(block, "attn.to_out.0")
    up = Group(block, "ff_context.linear_in"), Group(block, "ff.linear_in")
    down = Group(block, "ff_context.linear_out"), Group(block, "ff.linear_out")
    pairs = qkv, out, up, down

    def parts(heads: int) -> Double:
        qkvs, outs, ups, downs = ((a.linear(), b.linear()) for a, b in pairs)
        return Double(heads, norms_of(block.attn), qkvs, outs, ups, downs)

    return [group for pair in pairs for group in pair], parts


class Single(NamedTuple):
    """A block of one stream, in which txt and img stand behind each other."""

    heads: int
    norms: tuple[Tensor, Tensor]  # of q and k
    reads: Linear  # q, k, v and the MLP's gate and up: one layer
    down: Linear
    apart: bool  # two products read, one for q, k and v and one for the MLP: 2/3 of the weights dequantized at once
    repeatable: bool = False  # whether the attention's gradient is the same every time


def _read_single(block: Any, apart: bool) -> tuple[list[Group], Callable[[int], Single]]:
    attn = block.attn
    reads, down = Group(block, "attn.to_qkv_mlp_proj"), Group(block, "attn.to_out")
    width = reads.frozen.shape[1]
    apart = apart and can_cut(reads.frozen, 3 * width)

    def parts(heads: int) -> Single:
        norms = attn.norm_q.weight, attn.norm_k.weight
        return Single(heads, norms, reads.linear(), down.linear(), apart)

    return [reads, down], parts


def single_block(block: Single, x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, tokens, width]; its modulation [batch, 3 * width]."""
    shift, scale, gate = mod.chunk(3, dim=-1)
    normed, width, end = modulated(x, shift, scale), x.shape[-1], block.reads.frozen.shape[0]
    # split at once: the gradient is one concatenation, where that of parts of parts is a sum of tensors of zeros
    widths, cut = [*[width] * 3, *[(end - 3 * width) // 2] * 2], 3 * width
    if block.apart:
        qkv, mlp = (linear(normed, rows_of(block.reads, *rows))[0] for rows in ((0, cut), (cut, end)))
        outputs = *qkv.split(widths[:3], dim=-1), *mlp.split(widths[3:], dim=-1)
    else:
        outputs = linear(normed, block.reads)[0].split(widths, dim=-1)
    q, k, v, gate_mlp, up = outputs
    q, k, v = (y.unflatten(-1, (block.heads, -1)) for y in (q, k, v))
    q, k = rms_norm(q, block.norms[0]), rms_norm(k, block.norms[1])
    attended = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, block.down.frozen.half, block.repeatable)
    return x + gate[:, None] * linear(torch.cat([attended, functional.silu(gate_mlp) * up], dim=-1), block.down)[0]


def _double_arguments(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    assert not joint_attention_kwargs, "the cache of reference tokens (kv_cache_mode) is diffusers' own blocks' alone"
    return (encoder_hidden_states, hidden_states), (temb_mod_txt, temb_mod_img, *image_rotary_emb)


def _single_arguments(
    hidden_states: Tensor,
    encoder_hidden_states: None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    assert encoder_hidden_states is None and not joint_attention_kwargs
    return (hidden_states,), (temb_mod, *image_rotary_emb)


def _double(again: Any, block: Double, *tensors: Tensor) -> Any:
    return again(partial(double_block, swiglu), block, *tensors)


def _single(again: Any, block: Single, *tensors: Tensor) -> Any:
    return (again(single_block, block, *tensors),)


def _embed(transformer: Any, timesteps: Tensor, guidance: Tensor | None, pooled: Tensor | None) -> Tensor:
    if guidance is not None:
        guidance = (guidance.to(timesteps.dtype) * 1000).expand(len(timesteps))
    temb: Tensor = transformer.time_guidance_embed(timesteps * 1000, guidance)
    return temb


def _velocity(
    transformer: Any, img: Tensor, txt: Tensor, modulations: Sequence[Tensor], rotary: tuple[Tensor, Tensor]
) -> Tensor:
    img_mod, txt_mod, mod, last = modulations
    img, words = transformer.x_embedder(img), txt.shape[1]
    for block in transformer.transformer_blocks:
        txt, img = block(
            hidden_states=img,
            encoder_hidden_states=txt,
            temb_mod_img=img_mod,
            temb_mod_txt=txt_mod,
            image_rotary_emb=rotary,
        )
    x = torch.cat([txt, img], dim=1)
    for block in transformer.single_transformer_blocks:
        x = block(hidden_states=x, encoder_hidden_states=None, temb_mod=mod, image_rotary_emb=rotary)
    return last_norm(transformer, x[:, words:], last)


FORMS = (
    Form("transformer_blocks", _read_double, _double_arguments, _double),
    Form("single_transformer_blocks", _read_single, _single_arguments, _single),
)
_SHARED = "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation", "norm_out"
OUTSIDE = Outside(_embed, tuple(f"{name}.linear" for name in _SHARED), _velocity)
