"""What `infer/fast/install.py` asks of a family: how its blocks of each list are read and computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from infer.fast.group import Group


class Form(NamedTuple):
    """How the blocks of one of a transformer's lists are read and computed."""

    blocks: str
    """The name of the list in diffusers' transformer; it calls the lists in the family's order of forms."""
    read: Callable[[Any, bool], tuple[list[Group], Callable[[int], Any]]]
    """(block, apart) -> its layers, and a function that gives the block's parts, adapters included, for a number of
    heads. apart: the weights of the largest product are to be dequantized in pieces."""
    arguments: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    """diffusers' arguments of a block -> the streams that it changes, and what else it reads."""
    compute: Callable[..., tuple[Tensor, ...]]
    """(again, parts, *streams, *rest) -> the streams; what `again(function, *arguments)` computes is computed again in
    the backward pass."""


class Outside(NamedTuple):
    """What a family's transformer does outside of its blocks, in sampling with precomputed modulations
    (infer/fast/precomputed.py)."""

    embed: Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]
    """(transformer, timesteps [steps] from 0 to 1, guidance [1], pooled text [1, width]) -> the conditioning vectors
    [steps, width]."""
    layers: tuple[str, ...]
    """The linear layers outside of the blocks that read their SiLU, the last norm's at the end."""
    velocity: Callable[..., Tensor]
    """(transformer, latents, embedded text, modulations, (cos, sin)) -> velocity; modulations: the outputs [1, out] of
    the blocks' own layers in the blocks' order, and then of `layers`."""


def last_norm(transformer: Any, x: Tensor, modulation: Tensor) -> Tensor:
    """x [1, tokens, width] -> velocity [1, tokens, channels]; modulation: norm_out.linear's [1, 2 * width]."""
    scale, shift = modulation.chunk(2, dim=-1)
    velocity: Tensor = transformer.proj_out(transformer.norm_out.norm(x) * (1 + scale)[:, None] + shift[:, None])
    return velocity
