"""Which adapters of a transformer are on, and at what weight."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infer.adapter.lora import RECOVERY


def set_adapters(transformer: Any, weights: dict[str, float]) -> None:
    """Have exactly these adapters on, each at its weight times its own strength, and the recovery adapter, if there is
    one, beside them. None restores the base model's output bit for bit.

    Raises:
        ValueError: there is no such adapter (diffusers would draw the base model), or a weight is no number.
    """
    there = getattr(transformer, "peft_config", {})
    for name, weight in weights.items():
        if name not in there:
            loaded = ", ".join(there) or "none"
            raise ValueError(f"there is no adapter {name!r}; loaded are {loaded}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} is {weight}; give a number")
    if not there:
        return
    on = {name: weight for name, weight in ({RECOVERY: 1.0} | weights).items() if weight and name in there}
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if on:
        transformer.enable_adapters()
        transformer.set_adapters(list(on), list(on.values()))
    else:
        transformer.disable_adapters()
    transformer.requires_grad_(False)  # PEFT has every adapter learn that is on
    for parameter in trained:
        parameter.requires_grad_(True)


def switch(transformer: Any, on: bool) -> None:
    """All adapters on at weight 1, or all but the recovery adapter off, which without one restores the base bit for
    bit."""
    set_adapters(transformer, dict.fromkeys(transformer.peft_config, 1.0) if on else {})


@contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """The base, with the recovery adapter if there is one, for a with-block; afterwards all adapters are on at weight
    1."""
    switch(transformer, False)
    try:
        yield
    finally:
        switch(transformer, True)
