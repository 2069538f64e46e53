"""What sampling knows before its first step: all steps' modulations, the embedded text and the rotary tables.

FLUX.1's blocks modulate by layers of their own, 3.2 of its 11.9 G parameters, that multiply one vector: of timestep,
guidance and pooled text. Step by step their weights are read once a step for one row; here once a picture for the rows
of all its steps. A step's row is an input of the transformer like any other, so that a captured call
(infer/fast/cuda_graph.py) reads it where it reads the others. Nothing is kept from one picture to the next: weights,
adapters and texts may have changed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infer.fast.blocks import linear
from infer.fast.cuda_graph import Sampler
from infer.fast.form import Outside
from infer.fast.group import Group
from infer.fast.offload import Offload
from infer.fast.weights import Linear, dequantize_at_once

AT_ONCE = 64  # steps: 135 MB of FLUX.1's modulations


class Precomputed:
    """What a transformer of fast blocks computes before the first step, and its call with that."""

    def __init__(self, outside: Outside, blocks: list[list[Group]], offload: Offload | None) -> None:
        self.outside, self.offload = outside, offload
        self.groups = [(i, each) for i, groups in enumerate(blocks) for each in groups if each.modulates()]

    def steps(self, transformer: Any, call: dict[str, Any], timesteps: Tensor) -> Iterator[dict[str, Tensor]]:
        """What `velocity` is given at each step but for the latents.

        call: what the transformer's own forward is given at every step; timesteps: [steps], from 0 to 1.
        """
        text = transformer.context_embedder(call["encoder_hidden_states"])
        cos, sin = transformer.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
        # within a budget a table of one size whatever the steps: one was drawn to see what a drawing takes
        rows = AT_ONCE if self.offload is not None else min(AT_ONCE, len(timesteps))
        table = text.new_empty(rows, sum(self._widths(transformer)))
        for some in timesteps.split(AT_ONCE):
            temb = self.outside.embed(transformer, some, call["guidance"], call.get("pooled_projections"))
            self._fill(transformer, table[: len(some)], functional.silu(temb))
            for row in table[: len(some)].split(1):
                yield {"encoder_hidden_states": text, "modulations": row, "cos": cos, "sin": sin}

    def _fill(self, transformer: Any, table: Tensor, x: Tensor) -> None:
        """Each layer's outputs for x [steps, width] into its columns of `table` [steps, of all layers]."""
        columns = iter(table.split(self._widths(transformer), dim=-1))
        for i, group in self.groups:
            frozen = group.frozen if self.offload is None else self.offload.at_device(i, group)
            weights = dequantize_at_once(frozen, torch.float16 if frozen.half else x.dtype)
            # never in 8 bits; for so few rows no kernel adds an adapter's update in place
            frozen = frozen._replace(kind="plain", stored=weights, scale=None, nested=None, eight=None, in_place=False)
            next(columns).copy_(linear(x, Linear(frozen, group.linear().adapters))[0])
        for name in self.outside.layers:
            next(columns).copy_(transformer.get_submodule(name)(x))

    def velocity(self, transformer: Any, *, modulations: Tensor, cos: Tensor, sin: Tensor, **streams: Tensor) -> Tensor:
        """The velocity [1, tokens, channels]; streams: packed latents (hidden_states) and the embedded text
        (encoder_hidden_states)."""
        img, txt = streams["hidden_states"], streams["encoder_hidden_states"]
        parts = modulations.split(self._widths(transformer), dim=-1)
        return self.outside.velocity(transformer, img, txt, parts, (cos, sin))

    def _widths(self, transformer: Any) -> list[int]:
        outer = (transformer.get_submodule(name).out_features for name in self.outside.layers)
        return [*(group.frozen.shape[0] for _, group in self.groups), *outer]


def steps_of(transformer: Any, call: dict[str, Any], timesteps: Tensor) -> Iterator[dict[str, Any]]:
    """What the transformer is given at each step but for the latents; timesteps: [steps], from 0 to 1.

    Nothing is precomputed for diffusers' own blocks and compiled ones, where gradients are asked for, for several
    pictures at once, and where others take part in the transformer's call.
    """
    ahead: Precomputed | None = getattr(transformer, "precomputed", None)
    batch = len(call["hidden_states"])
    if ahead is None or torch.is_grad_enabled() or batch > 1 or _called_by_others(transformer):
        return (call | {"timestep": timestep.expand(batch)} for timestep in timesteps)
    return ahead.steps(transformer, call, timesteps)


def _called_by_others(transformer: Any) -> bool:
    """Whether hooks, or a forward that others have put in place of the class's own, wait for diffusers' arguments."""
    own = transformer.__dict__.get("forward")
    return bool(transformer._forward_pre_hooks or transformer._forward_hooks) or not (
        own is None or isinstance(own, Sampler)
    )


def velocity_of(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    """The velocity of what `steps_of` gave, with the latents."""
    if "modulations" in inputs and not isinstance(transformer.forward, Sampler):
        velocity: Tensor = transformer.precomputed.velocity(transformer, **inputs)
    else:
        velocity = transformer(**inputs, return_dict=False)[0]
    return velocity
