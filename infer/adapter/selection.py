"""Several adapters at once, each with its weight, at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from infer.adapter.read import find_adapter, read_notes
from infer.checkpoint.model import Model
from infer.program.bounds import check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand

_numbers = count()


@dataclass
class Weighted:
    """An adapter and how strongly it is on."""

    path: str = ""
    """A LoRA file of any program, or its folder."""
    weight: float = 1.0
    """Times its own strength."""

    def __post_init__(self) -> None:
        check_most(self, f"adapter {self.path}: ", weight=10**6)
        expand(self, "path")
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of adapter {self.path} is {self.weight}; give a number")


@dataclass
class Trained:
    """A trained adapter, and others that are on with it."""

    path: str | None = None
    """A LoRA file of any program, or its folder; null is no adapter."""
    name: str | None = None
    """Its name in the report; null takes the run's."""
    weight: float = 1.0
    """Times its own strength."""
    also: list[Weighted] = field(default_factory=list)
    """More adapters that are on at the same time, as in 'adapter.also=[{path:b,weight:0.5}]'."""

    def __post_init__(self) -> None:
        expand(self, "path")
        if self.path is None and self.also:
            raise ValueError("adapter.also is given without adapter.path; name the first adapter as adapter.path")
        if self.path is None:
            refuse_idle(self, "adapter.", ("name", "weight"), "adapter.path is null")
        Weighted(self.path or "", self.weight)

    def all(self) -> list[Weighted]:
        """Raises:
        ValueError: one of them is absent, or is no adapter of its own.
        """
        found = [] if self.path is None else [Weighted(self.path, self.weight), *self.also]
        for one in found:
            if read_notes(find_adapter(one.path)).get("recovers"):
                raise ValueError(
                    f"{one.path} is a recovery adapter, which belongs to quantized weights; give it to compare as "
                    "+recovery.<precision>=path and to train as adapter.recovery=path"
                )
        return found


def load_chosen(transformer: Any, chosen: Trained, model: Model) -> list[str]:
    """Load all of them, on together; returns their names in the model. These are new ones each time: the user's name
    could be that of a module's method, and captured graphs are told apart by names."""
    from infer.adapter.attach import load_adapter
    from infer.adapter.switch import set_adapters

    weights = {}
    for one in chosen.all():
        name = f"chosen-{next(_numbers)}"
        load_adapter(transformer, one.path, name, model, one.weight)
        weights[name] = one.weight
    set_adapters(transformer, weights)
    return list(weights)
