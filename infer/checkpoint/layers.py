"""A transformer's layers and their sizes, from its config.json alone: no torch, no weights.

So an adapter's targets and a plan's bytes are known before anything heavy is imported.
tests/infer/checkpoint/test_layers.py compares it with diffusers' own models.
"""

from collections.abc import Mapping
from typing import Any

from infer.family.family import Linear
from infer.family.find import of_config


def linear_shapes(config: Mapping[str, Any]) -> dict[str, Linear]:
    """Every linear layer of a transformer by diffusers' name.

    Raises:
        KeyError: the config lacks a number.
        ValueError: it is of no family.
    """
    return of_config(config).linear_shapes(config)


def norm_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of every norm that has some, by its name: those of queries and keys."""
    return of_config(config).norm_sizes(config)
