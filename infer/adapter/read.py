"""LoRA files of any program -> pairs: diffusers', PEFT's, kohya's, ComfyUI's, ai-toolkit's, XLabs' and others.

What a file holds is, for each layer, a pair A and B and a strength: the layer becomes W + strength x B A. Files differ
in the layers' names (infer/adapter/layer_names.py), in the family that these are of (file_family.py), in what they
fuse, and in where the strength stands (strengths.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from infer.adapter.contents import Contents, other_kind, read_contents
from infer.adapter.factors import NAMES, Factors, factors_of_state, kind_of_parts
from infer.adapter.file_family import file_family
from infer.adapter.layer_names import families_with, halves_swapped, layers_of, rows_within
from infer.adapter.lycoris import MOST, as_lora, rank_as_lora
from infer.adapter.own_checkpoint import WEIGHTS, is_checkpoint, read_checkpoint
from infer.adapter.read_factors import factors_in, peft_settings, peft_strength
from infer.adapter.strengths import Strengths
from infer.family.family import Family, Linear
from infer.program.absent import meant
from infer.program.paths import is_hub_id

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"


class Pair(NamedTuple):
    """One layer's update: strength x up down."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]
    strength: float
    magnitude: Tensor | None = None  # DoRA's [out]


Pairs = dict[str, Pair]


def find_adapter(path: str) -> Path:
    """The adapter's file from a path to it or to its folder, which may be a checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    file = Path(path)
    if file.is_dir():
        candidates = [file / FILE, file / "adapter" / FILE, file / PEFT_FILE, file / WEIGHTS]
        file = next((c for c in candidates if c.is_file()), candidates[0])
    if not file.is_file():
        mend = f"give a .safetensors file or a folder that holds {FILE}"
        if not os.path.lexists(path):
            mend = meant(path, mend)
        if is_hub_id(path):
            mend += f"; one that is on the Hub is downloaded first: hf download {path} --local-dir adapters"
        elif Path(path).is_dir() and (others := sorted(each.name for each in Path(path).glob("*.safetensors"))):
            mend = f"name one of the files that are there: {', '.join(others[:5])}"
        raise ValueError(f"there is no adapter at {file}; {mend}")
    return file


def read_notes(file: Path) -> dict[str, Any]:
    """What `save_adapter` noted in the header; empty for other programs' files.

    Raises:
        ValueError: the file cannot be read, or its notes are no JSON object.
    """
    try:
        with safe_open(file, framework="numpy") as reader:  # "pt" would import torch
            notes = json.loads((reader.metadata() or {}).get("flux_lora", "{}"))
        if not isinstance(notes, dict):
            raise ValueError(f"its notes are {notes!r}")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        mend = "take it away: train.py makes it again from the last checkpoint"
        raise ValueError(f"{file} is no adapter that can be read: {other_kind(file) or f'{error}; {mend}'}") from error
    return notes


def read_adapter(path: str, drop_text_encoder: bool = False, model: Container[str] | None = None) -> Pairs | Factors:
    """An adapter file of any format by diffusers' names of the transformer's layers: as pairs, LoHa and LoKr too where
    the rank of their pairs is not too high; else, and OFT, as their own factors.

    model: the names of the layers of the model that it is for, where one is known; they decide where names mean
    different layers in two families and the file does not tell which family it is of.

    Raises:
        ValueError: it is unreadable, not finite or zero, half a pair is absent, a key is unknown, or nothing tells its
            family.
    """
    file = find_adapter(path)
    if is_checkpoint(file):
        return _of_checkpoint(file, *read_checkpoint(file))
    contents = read_contents(file, drop_text_encoder)
    kinds = {kind_of_parts(parts) for parts in contents.found.values()}
    if "oft" in kinds or _too_high(contents.found.values()):
        return factors_in(contents, model)
    return _pairs_in(contents, model)


def _too_high(layers: Iterable[dict[str, Tensor]]) -> bool:
    """Whether one of them is LoHa or LoKr of too high a rank to be a pair."""
    return any(rank_as_lora(parts) > MOST for parts in layers if kind_of_parts(parts))


def _of_checkpoint(file: Path, kind: str, state: dict[str, Tensor], strength: float) -> Pairs | Factors:
    """What `read_checkpoint` gave of a run's checkpoint, as pairs where it can be."""
    if kind == "lora":
        return pairs_of(state, dict.fromkeys(map(_layer, state), strength))
    factors = factors_of_state(kind, state, strength)
    if kind == "oft" or _too_high(factors.layers.values()):
        return factors
    pairs: Pairs = {}
    for layer, parts in factors.layers.items():
        found = as_lora(file, layer, parts, strength)
        pairs[layer] = Pair(found["down"], found["up"], float(found["alpha"]) / found["down"].shape[0])
    return pairs


def read_whole(path: str, drop_text_encoder: bool = False) -> Pairs | Factors:
    """`read_adapter`, with LoKr and LoHa of any rank as their own factors where they name diffusers' layers one by one.

    Raises:
        ValueError: as `read_adapter`.
    """
    file = find_adapter(path)
    if is_checkpoint(file):
        kind, state, strength = read_checkpoint(file)
        return (
            _of_checkpoint(file, kind, state, strength) if kind == "lora" else factors_of_state(kind, state, strength)
        )
    contents = read_contents(file, drop_text_encoder)
    alone = all(len(layers_of(name, family)) == 1 for name in contents.found for family in families_with([name])[:1])
    if alone and all(map(kind_of_parts, contents.found.values())):
        return factors_in(contents, None)
    return read_adapter(path, drop_text_encoder)


def read_pairs(path: str, drop_text_encoder: bool = False, model: Container[str] | None = None) -> Pairs:
    """`read_adapter` where only pairs can be used.

    Raises:
        ValueError: as `read_adapter`, or it is OFT or a LoKr of too high a rank.
    """
    found = read_adapter(path, drop_text_encoder, model)
    if isinstance(found, Factors):
        raise ValueError(f"{path} is {no_lora(found)}; merge it into the weights (infer/merge.py) and use those")
    return found


def no_lora(factors: Factors) -> str:
    """What an adapter is that is no LoRA, and why."""
    name = NAMES[factors.kind]
    why = "turns what a layer reads" if factors.kind == "oft" else f"is of a rank above {MOST} as LoRA"
    return f"{name}, which {why} and cannot be written as LoRA"


def _pairs_in(contents: Contents, model: Container[str] | None) -> Pairs:
    file, header, keys, found = contents
    if any(map(kind_of_parts, found.values())):
        settings = peft_settings(file, keys)
        said = peft_strength(file, settings) if settings else None
        found = {
            name: as_lora(file, name, parts, said) if kind_of_parts(parts) else parts for name, parts in found.items()
        }
    family = file_family(file, {name: _shape(file, name, found[name]) for name in sorted(found)}, model)
    strengths = Strengths(file, header, keys, found, family)
    pairs: Pairs = {}
    for name in sorted(found):
        for layer, pair in _split(file, name, found[name], family, strengths).items():
            if layer in pairs:
                raise ValueError(f"{file} says twice what {layer} gets; it mixes two formats, keep one of them")
            pairs[layer] = pair
    if not any(pair.strength and bool(pair.up.any()) and bool(pair.down.any()) for pair in pairs.values()):
        raise ValueError(f"{file} is zero in every layer: it would draw the base model; train it again")
    if len({pair.magnitude is None for pair in pairs.values()}) > 1:
        raise ValueError(f"{file} is DoRA in some layers and LoRA in others, which cannot be loaded; train it again")
    return pairs


def _layer(key: str) -> str:
    """The layer of a tensor under PEFT's names."""
    return key.partition(".lora_")[0]


def pairs_of(state: dict[str, Tensor], strengths: dict[str, float]) -> Pairs:
    """`adapter_state` as pairs, of the layers whose strengths are given."""
    return {
        layer: Pair(
            state[f"{layer}.lora_A.weight"],
            state[f"{layer}.lora_B.weight"],
            strength,
            state.get(f"{layer}.lora_magnitude_vector"),
        )
        for layer, strength in strengths.items()
    }


def _shape(file: Path, name: str, parts: dict[str, Tensor]) -> Linear:
    """The rows of one name's B and the columns of its A."""
    if "down" not in parts or "up" not in parts:
        there, absent = ("B", "A") if "up" in parts else ("A" if "down" in parts else "alpha", "B")
        raise ValueError(f"{file} has {there} but no {absent} for {name}: half a pair; copy or train it again")
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not (down.numel() and up.numel()):
        raise ValueError(f"{file}: A {tuple(down.shape)} and B {tuple(up.shape)} of {name} are no pair of one rank")
    return Linear(up.shape[0], down.shape[1])


def _split(file: Path, name: str, parts: dict[str, Tensor], family: Family, strengths: Strengths) -> Pairs:
    """One name's tensors -> the pairs of the layers that it means."""
    down, up, magnitude = parts["down"], parts["up"], parts.get("magnitude")
    layers = layers_of(name, family)
    strength = strengths(layers[0], name, down.shape[0], parts.get("alpha"))
    if magnitude is not None:
        magnitude = magnitude.flatten()
    if halves_swapped(name):
        up = up.roll(up.shape[0] // 2, 0)
        magnitude = None if magnitude is None else magnitude.roll(len(magnitude) // 2)
    if len(layers) == 1:
        return {layers[0]: Pair(down, up, strength, magnitude)}
    width = down.shape[1]
    rows = rows_within(layers, family, width)
    if sum(rows) != up.shape[0] or (magnitude is not None and len(magnitude) != up.shape[0]):
        raise ValueError(f"{file} does not fit any model at {name}: B has {up.shape[0]} rows for {width} features")
    ups = dict(zip(layers, up.split(rows), strict=True))
    if magnitude is not None:  # it says something of every row, also of those that nothing is added to
        magnitudes = magnitude.split(rows)
        return {
            layer: Pair(down, part, strength, rows) for (layer, part), rows in zip(ups.items(), magnitudes, strict=True)
        }
    found = {}
    for layer, part in ups.items():
        used = part.any(0)  # of a block-diagonal B, each layer's own columns
        if used.any():
            found[layer] = Pair(down[used], part[:, used].contiguous(), strength)
    return found or {layer: Pair(down, part, strength) for layer, part in ups.items()}
