"""The transformer in a single file: which family it is of, its config by its tensors' sizes, and where in the file each
of diffusers' tensors is.

Files have Black Forest Labs' names (infer/family/), behind a prefix such as `model.diffusion_model.` where other parts
are in them too, or diffusers' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from infer.family.family import Family, Table
from infer.family.find import FAMILIES
from infer.single_file.header import Header, check_stored_kinds

STACKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
NORMS = {  # within a block, and diffusers' names
    "double_blocks": {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    "single_blocks": {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
}
OTHERS = {  # a name that gives another model away, and what it is
    "joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "input_blocks.0.0.weight": "Stable Diffusion 1, 2 or XL",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "ref_time_in.in_layer.weight": "FLUX.3",
    "noise_refiner.0.attention.qkv.weight": "Lumina 2 or Z-Image",
    "transformer_blocks.0.img_mod.1.weight": "Qwen-Image",
    "blocks.0.self_attn.q.weight": "Wan",
}


class Found(NamedTuple):
    """A transformer in a file."""

    family: Family
    prefix: str
    original: bool
    """Whether it has Black Forest Labs' names."""


class Piece(NamedTuple):
    """Where a tensor of diffusers' is in a file."""

    name: str
    start: int = 0
    rows: int | None = None
    """None: all of them."""
    swapped: bool = False
    """Whether its halves stand the other way round."""


def find_transformer(header: Header) -> Found | None:
    """The transformer in a file; None if there is none that is known here."""
    for end, original in (("img_in.weight", True), ("x_embedder.weight", False)):
        for name in header.tensors:
            if name != end and not name.endswith(f".{end}"):
                continue
            prefix = name.removesuffix(end)
            for family in FAMILIES:
                if all(f"{prefix}{each}.weight" in header.tensors for each in _marks(family, original)):
                    return Found(family, prefix, original)
    return None


def other_model(header: Header) -> str | None:
    """The name of another model that a file holds, if it is one that is known by its tensors' names."""
    for mark, model in OTHERS.items():
        if any(name == mark or name.endswith(f".{mark}") for name in header.tensors):
            return model
    return None


def _marks(family: Family, original: bool) -> list[str]:
    """Layers that every transformer of a family has and one of another family lacks some of."""
    names = family.NAMES
    outside = {name: layers for name, layers in names.outside.items() if "guidance" not in name}
    if original:
        return [*outside, *(f"double_blocks.0.{name}" for name in names.double)]
    double = (f"transformer_blocks.0.{layer}" for layers in names.double.values() for layer in layers)
    return [*(layer for layers in outside.values() for layer in layers), *double]


def file_config(header: Header, found: Found, given: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config.json: that of the other parts' checkpoint, with the numbers that the file's sizes say.

    Raises:
        ValueError: a tensor that says one is absent, or has another number of dimensions.
    """
    named = _sizes(header, found)

    def size(layer: str, dimensions: int) -> tuple[int, ...]:
        if layer not in named:
            raise ValueError(f"it lacks {layer}; download it again")
        if len(named[layer]) != dimensions:
            raise ValueError(f"{layer} is of size {named[layer]}, where {dimensions} are due; download it again")
        return named[layer]

    width, channels = size("x_embedder.weight", 2)
    (head,) = size("transformer_blocks.0.attn.norm_q.weight", 1)
    config = dict(given) | {
        "_class_name": found.family.TRANSFORMER,
        "in_channels": channels,
        "num_layers": _count(named, "transformer_blocks"),
        "num_single_layers": _count(named, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": size("context_embedder.weight", 2)[1],
        "guidance_embeds": any(".guidance_embedder." in name for name in named),
    }
    config.pop("quantization_config", None)
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    if pooled in named:
        config["pooled_projection_dim"] = size(pooled, 2)[1]
    return config


def _sizes(header: Header, found: Found) -> dict[str, tuple[int, ...]]:
    """The sizes of diffusers' tensors; of those that are rows of one in the file, the size of that one."""
    within = {name.removeprefix(found.prefix): one.shape for name, one in header.tensors.items()}
    if not found.original:
        return within
    return {name: within[piece.name] for name, piece in _pieces(within, found, {}).items()}


def _count(names: Mapping[str, Any], stack: str) -> int:
    """Blocks of a stack."""
    return len({name.split(".", 2)[1] for name in names if name.startswith(f"{stack}.")})


def _pieces(within: Mapping[str, tuple[int, ...]], found: Found, rows: Mapping[str, int]) -> dict[str, Piece]:
    """Diffusers' tensors in a file of Black Forest Labs' names, without its prefix; rows: of layers that are not alone
    in theirs."""
    pieces: dict[str, Piece] = {}
    tables: dict[str, tuple[str, str, Table]] = {"": ("", "", found.family.NAMES.outside)}
    for name in within:
        block = re.match(r"(double_blocks|single_blocks)\.(\d+)\.", name)
        if block and block[0] not in tables:
            names = found.family.NAMES
            table = names.double if block[1] == "double_blocks" else names.single
            tables[block[0]] = (block[0], f"{STACKS[block[1]]}.{block[2]}.", table)
            for norm, layer in NORMS[block[1]].items():
                ends = (f"{block[0]}{norm}.{end}" for end in ("scale", "weight"))
                stored = next((each for each in ends if each in within), None)
                if stored:
                    pieces[f"{STACKS[block[1]]}.{block[2]}.{layer}.weight"] = Piece(stored)
    for original, own, table in tables.values():
        for name, layers in table.items():
            for end in ("weight", "bias"):
                stored, start = f"{original}{name}.{end}", 0
                if stored not in within:
                    continue
                for layer in layers:
                    count = rows.get(own + layer, 0) if len(layers) > 1 else None
                    pieces[f"{own}{layer}.{end}"] = Piece(stored, start, count, name == found.family.NAMES.swapped)
                    start += count or 0
    return pieces


def place_tensors(file: Path, header: Header, found: Found, config: Mapping[str, Any]) -> dict[str, Piece]:
    """Where in the file each tensor of a transformer of this config is, by diffusers' names.

    Raises:
        ValueError: the file lacks one, or one is of another size or is stored in a way that is not read.
    """
    layers, norms = found.family.linear_shapes(config), found.family.norm_sizes(config)
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in norms.items()}
    wanted |= {f"{name}.weight": tuple(layer) for name, layer in layers.items()}
    if found.family.BIAS:
        wanted |= {f"{name}.bias": (layer.rows,) for name, layer in layers.items()}
    within = {name.removeprefix(found.prefix): one.shape for name, one in header.tensors.items()}
    if found.original:
        pieces = _pieces(within, found, {name: layer.rows for name, layer in layers.items()})
    else:
        pieces = {name: Piece(name) for name in wanted if name in within}
    missing = sorted(wanted.keys() - pieces.keys())
    if missing:
        raise ValueError(
            f"{file} lacks {len(missing)} of the transformer's tensors ({missing[0]}, ...); download it again"
        )
    together: dict[str, int] = {}
    for name, size in wanted.items():
        together[pieces[name].name] = together.get(pieces[name].name, 0) + size[0]
    for name, size in wanted.items():
        stored = pieces[name].name
        if within[stored] != (together[stored], *size[1:]):
            raise ValueError(
                f"{file} stores {stored} in the size {within[stored]}, where its other tensors ask for "
                f"{(together[stored], *size[1:])}; download it again"
            )
    check_stored_kinds(file, header, [found.prefix + pieces[name].name for name in wanted])
    return {name: pieces[name]._replace(name=found.prefix + pieces[name].name) for name in wanted}
