"""FLUX.1's layers and their sizes, from the transformer's config.json alone: no torch, no weights.

So an adapter's targets and a plan's bytes are known before anything heavy is imported.
tests/infer/checkpoint/test_layers.py compares it with diffusers' own model.
"""

from typing import Any, NamedTuple

TIME = 256  # sines of a timestep, or of a guidance, that are embedded
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Linear(NamedTuple):
    """A linear layer with a bias."""

    rows: int
    """Its outputs."""
    columns: int
    """Its inputs."""


def linear_shapes(config: dict[str, Any]) -> dict[str, Linear]:
    """Every linear layer of a transformer by diffusers' name.

    Raises:
        KeyError: the config lacks a number.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = config["in_channels"]
    embedders = {"timestep": TIME, "text": config["pooled_projection_dim"]}
    if config.get("guidance_embeds"):
        embedders["guidance"] = TIME
    layers = {
        "x_embedder": Linear(width, channels),
        "context_embedder": Linear(width, config["joint_attention_dim"]),
        "norm_out.linear": Linear(2 * width, width),
        "proj_out": Linear(config.get("patch_size", 1) ** 2 * (config.get("out_channels") or channels), width),
    }
    for name, given in embedders.items():
        layers[f"time_text_embed.{name}_embedder.linear_1"] = Linear(width, given)
        layers[f"time_text_embed.{name}_embedder.linear_2"] = Linear(width, width)
    double = {f"attn.{name}": Linear(width, width) for name in ATTENTION}
    for norm, mlp in (("norm1", "ff"), ("norm1_context", "ff_context")):
        double[f"{norm}.linear"] = Linear(6 * width, width)
        double[f"{mlp}.net.0.proj"] = Linear(4 * width, width)
        double[f"{mlp}.net.2"] = Linear(width, 4 * width)
    single = {f"attn.{name}": Linear(width, width) for name in ATTENTION[:3]}
    single |= {
        "norm.linear": Linear(3 * width, width),
        "proj_mlp": Linear(4 * width, width),
        "proj_out": Linear(width, 5 * width),
    }
    for i in range(config["num_layers"]):
        layers |= {f"transformer_blocks.{i}.{name}": layer for name, layer in double.items()}
    for i in range(config["num_single_layers"]):
        layers |= {f"single_transformer_blocks.{i}.{name}": layer for name, layer in single.items()}
    return layers


def norm_sizes(config: dict[str, Any]) -> dict[str, int]:
    """Parameters of every norm that has some, by its name: those of queries and keys."""
    sizes: dict[str, int] = {}
    for stack, count, names in (
        ("transformer_blocks", config["num_layers"], ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
        ("single_transformer_blocks", config["num_single_layers"], ("norm_q", "norm_k")),
    ):
        for i in range(count):
            sizes |= {f"{stack}.{i}.attn.{name}": config["attention_head_dim"] for name in names}
    return sizes
