"""Teach the text encoders which word belongs to which thing, beside what the transformer makes of their words.

From T5's output at the word of each shape, and from CLIP's pooled vector, a linear layer must tell the thing's count,
size, texture, colour, shape and place. The layers are thrown away; that a colour is bound to its thing stays.
"""

import re

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel, T5TokenizerFast

from scripts.tiny import world

THINGS = 2  # a caption names at most so many
PLACES = (*world.PLACES, "left", "right", "above", "below")
PARTS = (tuple(world.COUNTS.values()), tuple(world.SIZES), world.TEXTURES, tuple(world.COLOURS), world.SHAPES, PLACES)
# by relation, where the first and the second thing named are
RELATIONS = {
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}


def labels(caption: str) -> list[list[int]]:
    """For each of THINGS, the index of each part in PARTS plus one; 0: not said; -100: there is no such thing."""
    singles = {name: name for name in world.SHAPES} | {world.plural(name): name for name in world.SHAPES}
    words = [part for kind in (*PARTS[:2], PARTS[2][1:]) for part in kind]
    pattern = rf"\b((?:(?:{'|'.join(words)}) )*)({'|'.join(world.COLOURS)}) ({'|'.join(singles)})\b"
    relation = next((word for word in RELATIONS if word in caption), None)
    place = next((p for p in sorted(world.PLACES, key=len, reverse=True) if p in caption), None)
    rows = []
    for k, match in enumerate(re.finditer(pattern, caption)):
        said = {*match[1].split(), match[2], singles[match[3]]}
        said |= {RELATIONS[relation][k]} if relation else {place} if place else set()
        rows.append([next((i + 1 for i, part in enumerate(kind) if part in said), 0) for kind in PARTS])
    return rows + [[-100] * len(PARTS)] * (THINGS - len(rows))


class Heads(nn.Module):
    """Linear layers from a vector to the parts of so many things."""

    def __init__(self, width: int, things: int) -> None:
        super().__init__()
        self.things = things
        self.layer = nn.Linear(width, things * sum(len(kind) + 1 for kind in PARTS))

    def loss(self, vector: Tensor, wanted: Tensor) -> Tensor:
        """vector [batch, width], wanted [batch, things, parts] -> the mean cross entropy of all parts."""
        logits = self.layer(vector).unflatten(-1, (self.things, -1)).float().split([len(k) + 1 for k in PARTS], -1)
        losses = [
            nn.functional.cross_entropy(each.flatten(0, 1), wanted[..., i].flatten(), reduction="sum")
            for i, each in enumerate(logits)
        ]
        return torch.stack(losses).sum() / (wanted >= 0).sum().clamp(min=1)


class Lesson(nn.Module):
    """The linear layers, and what they make of both encoders' outputs."""

    shapes: Tensor  # T5's ids of the shapes' words

    def __init__(self, t5: T5EncoderModel, clip: CLIPTextModel, tokenizer: T5TokenizerFast) -> None:
        super().__init__()
        self.word, self.whole = Heads(t5.config.d_model, 1), Heads(clip.config.hidden_size, THINGS)
        words = [word for name in world.SHAPES for word in (name, world.plural(name))]
        self.register_buffer("shapes", torch.tensor([tokenizer.convert_tokens_to_ids(f"▁{word}") for word in words]))

    def forward(self, t5_ids: Tensor, text: tuple[Tensor, Tensor], wanted: Tensor) -> Tensor:
        """T5's ids [batch, tokens], states and pooled vector, labels [batch, THINGS, parts] -> the mean loss.

        A caption that was left empty names nothing: its labels count for nothing.
        """
        is_shape = (t5_ids[..., None] == self.shapes).any(-1)
        which = is_shape.cumsum(1)
        wanted = wanted.masked_fill(~is_shape.any(1)[:, None, None], -100)
        losses = [self.whole.loss(text[1], wanted)]
        for k in range(THINGS):
            at = (is_shape & (which == k + 1)).float()
            losses.append(self.word.loss((text[0] * at[..., None]).sum(1), wanted[:, k : k + 1]))
        return torch.stack(losses).mean()
