"""Which linear layers an adapter is put on: presets and regular expressions over their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from infer.family.family import Linear
from infer.family.find import FAMILIES
from infer.quantize.precision import linear_layers

if TYPE_CHECKING:
    from torch import nn

BLOCKS = r"(transformer_blocks|single_transformer_blocks)\.\d+\."
ATTENTION = "|".join(family.ATTENTION for family in FAMILIES)
MLP = "|".join(family.MLP for family in FAMILIES)
PRESETS = {
    "attention": f"{BLOCKS}({ATTENTION})",
    "attention+mlp": f"{BLOCKS}({ATTENTION}|{MLP})",
    "double": rf"transformer_blocks\.\d+\.({ATTENTION}|{MLP})",
    "single": rf"single_transformer_blocks\.\d+\.({ATTENTION}|{MLP})",
    "all": ".*",
}
"""Of every family: no layer of one is called as another kind of layer of another."""


def base_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The model's own linear layers by their own names, whether adapters sit on them or not."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in linear_layers(transformer).items()
        if ".lora_" not in name
    }


def match_targets(layers: Mapping[str, Linear], targets: str, rank: int = 1) -> list[str]:
    """Those of the linear layers, by name, that a preset or a regular expression means, for adapters of a rank.

    Raises:
        ValueError: none, and the message lists what there is; or one is narrower than the rank.
    """
    pattern = re.compile(PRESETS.get(targets, targets))
    found = [name for name in layers if pattern.fullmatch(name)]
    if not found:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers})
        raise ValueError(
            f"adapter.targets {targets!r} matches no linear layer. Presets: {', '.join(PRESETS)}. "
            f"Layers (write a number or \\d+ for *): {', '.join(kinds)}"
        )
    narrow = min(found, key=lambda name: min(layers[name]))
    least = min(layers[narrow])
    if rank > least:
        raise ValueError(
            f"adapter.rank is {rank}, but {narrow} maps {layers[narrow].columns} to {layers[narrow].rows} features, "
            f"and an update of it has rank {least} at most; set adapter.rank={least} or less, or adapter.targets to "
            "wider layers"
        )
    return found
