"""Which family a checkpoint, a config or a model is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer.family import flux1, flux2
from infer.family.family import Family

FAMILIES: tuple[Family, ...] = (flux1, flux2)
SIZES = {path: sizes for family in FAMILIES for path, sizes in family.SIZES.items()}
"""The sizes of published checkpoints, by their Hub id."""
LICENCES = {path: licence for family in FAMILIES for path, licence in family.LICENCES.items()}
"""Theirs: the Hub's name of the licence, and the licence's own if that is `other`."""


def of_pipeline(name: str, where: str) -> Family:
    """The family of a diffusers pipeline by its class; where: what names it, for the message.

    Raises:
        ValueError: no family has it, or it is one that is not taken.
    """
    for family in FAMILIES:
        if name in family.PIPELINES:
            reason = family.PIPELINES[name]
            if reason:
                raise ValueError(f"{where} is of a {name}, which is not taken here: {reason}")
            return family
    taken = [one for family in FAMILIES for one, reason in family.PIPELINES.items() if not reason]
    raise ValueError(
        f"{where} is of a {name}; this toolkit reads {' and '.join(family.NAME for family in FAMILIES)} checkpoints "
        f"({', '.join(taken)})"
    )


def of_config(config: Mapping[str, Any]) -> Family:
    """The family of a transformer's or an autoencoder's config.json; FLUX.1 where it names no class.

    Raises:
        ValueError: it is of no family.
    """
    name = config.get("_class_name", flux1.TRANSFORMER)
    found = [family for family in FAMILIES if name in (family.TRANSFORMER, family.AUTOENCODER)]
    if not found:
        known = ", ".join(each for family in FAMILIES for each in (family.TRANSFORMER, family.AUTOENCODER))
        raise ValueError(f"a config.json of this model is of a {name}; this toolkit reads {known}")
    return found[0]


def of_model(model: Any) -> Family:
    """The family of a loaded transformer or autoencoder, whether something wraps it or not."""
    model = getattr(model, "module", model)  # DistributedDataParallel
    for family in FAMILIES:
        # FSDP makes a class of its own that is derived from the model's
        if any(cls.__name__ in (family.TRANSFORMER, family.AUTOENCODER) for cls in type(model).__mro__):
            return family
    raise AssertionError(f"{type(model).__name__} is of no family")
