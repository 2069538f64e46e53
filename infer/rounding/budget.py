"""Layers' errors and a budget of bytes -> which of them are nf4, int8 or bf16.

All begin as NF4; then the step that takes the most squared error away for each byte that it adds is taken, again and
again, while it fits. Errors of different layers are taken to be independent: their squares add up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

LADDER = ("nf4", "int8", "bf16")
HEADER = "# python infer/sensitivity.py"  # the first line of a mixture's YAML


@dataclass
class Mixture:
    """A kind for each group of layers."""

    kinds: list[tuple[list[str], str]]  # the group's layers, and their kind
    total_bytes: int
    error: float  # predicted: root of the sum of squared relative errors
    nf4_error: float  # the same, with all layers NF4

    def describe(self) -> str:
        groups = {kind: sum(chosen == kind for _, chosen in self.kinds) for kind in LADDER}
        counts = ", ".join(f"{count} {kind}" for kind, count in groups.items() if count)
        return (
            f"{counts} of {len(self.kinds)} groups of layers, {self.total_bytes / 2**20:,.2f} MiB; predicted error of "
            f"the velocity {100 * self.error:.2f} %, all NF4 {100 * self.nf4_error:.2f} %"
        )

    def layers(self) -> dict[str, str]:
        """As `precision.layers` says it: a pattern for all blocks' layers of one name and kind."""
        blocks: dict[tuple[str, str, str], list[str]] = {}
        for names, kind in self.kinds:
            if kind == "nf4":
                continue
            for name in names:
                prefix, number, rest = _parts(name)
                blocks.setdefault((prefix, rest, kind), []).append(number)
        found = {}
        for (prefix, rest, kind), numbers in blocks.items():
            number = rf"\.({'|'.join(numbers)})\." if numbers[0] else ""
            found[f"{re.escape(prefix)}{number}{re.escape(rest)}"] = kind
        return found


def _parts(name: str) -> tuple[str, str, str]:
    """A layer's name -> its list of blocks, the block's number and the rest; the last two are empty outside blocks."""
    match = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.(.*)", name)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def choose(found: dict[str, Any], budget: int, option: str) -> Mixture:
    """The mixture for a measurement (infer/sensitivity.py) and a transformer of at most so many bytes.

    Raises:
        ValueError: not even NF4 fits.
    """
    groups = found["groups"]
    kinds = ["nf4"] * len(groups)
    total = found["other_bytes"] + sum(group["bytes"]["nf4"] for group in groups)
    if total > budget:
        raise ValueError(
            f"{option} is {budget / 2**30:.4g}, but the transformer takes {total / 2**30:.4g} GiB with every layer "
            "NF4; raise it, or quantize the absmax too (double_quant=true)"
        )
    while True:
        best, gain = None, 0.0
        for i, group in enumerate(groups):
            errors, sizes, now = group["errors"], group["bytes"], kinds[i]
            for kind in LADDER[LADDER.index(now) + 1 :]:
                added = sizes[kind] - sizes[now]
                if total + added <= budget and (errors[now] - errors[kind]) / added > gain:
                    best, gain = (i, kind, added), (errors[now] - errors[kind]) / added
        if best is None:
            break
        i, kind, added = best
        kinds[i], total = kind, total + added
    error = sum(group["errors"][kind] for group, kind in zip(groups, kinds, strict=True)) ** 0.5
    nf4 = sum(group["errors"]["nf4"] for group in groups) ** 0.5
    pairs = [(group["layers"], kind) for group, kind in zip(groups, kinds, strict=True)]
    return Mixture(pairs, total, error, nf4)
