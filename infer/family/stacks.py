"""The two stacks of blocks that every family's transformer has, double blocks before single ones."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def in_stacks(config: Mapping[str, Any], double: Mapping[str, T], single: Mapping[str, T]) -> dict[str, T]:
    """What each block has by its name within the block -> what the transformer has by diffusers' whole names."""
    found: dict[str, T] = {}
    for stack, count, own in (
        ("transformer_blocks", config["num_layers"], double),
        ("single_transformer_blocks", config["num_single_layers"], single),
    ):
        for i in range(count):
            found |= {f"{stack}.{i}.{name}": value for name, value in own.items()}
    return found


def norm_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the norms of queries and keys, by their names: no other norm has any, in FLUX.1 and in FLUX.2."""
    width = config["attention_head_dim"]
    double, single = ("norm_q", "norm_k", "norm_added_q", "norm_added_k"), ("norm_q", "norm_k")
    return in_stacks(config, {f"attn.{name}": width for name in double}, {f"attn.{name}": width for name in single})
