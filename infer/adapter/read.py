"""LoRA files of any program -> pairs: diffusers', PEFT's, kohya's, ComfyUI's, ai-toolkit's, XLabs' and others.

What a file holds is, for each layer, a pair A and B and a strength: the layer becomes W + strength x B A. Files differ
in the layers' names (infer/adapter/layer_names.py), in the family that these are of (file_family.py), in what they
fuse, and in where the strength stands (strengths.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from infer.adapter.file_family import file_family
from infer.adapter.foreign_files import reason
from infer.adapter.layer_names import families_with, halves_swapped, layers_of, rows_within
from infer.adapter.lycoris import PARTS, as_lora, is_lycoris
from infer.adapter.own_checkpoint import WEIGHTS, is_checkpoint, read_checkpoint
from infer.adapter.strengths import Strengths
from infer.family.family import Family, Linear
from infer.program.absent import meant
from infer.program.paths import POINTER, is_hub_id, kind_of_file

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"

_PREFIX = re.compile(
    r"(base_model\.model\.|transformer\.|model\.diffusion_model\.|diffusion_model\.|module\.|lora_unet_+"
    r"|lora_transformer[._]|lycoris_)+"
)
# what torch.compile, FSDP and activation checkpointing put between a module's names
_WRAPPER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# an adapter's own name may stand behind A and B, as PEFT holds them
_KEY = re.compile(
    r"(?P<name>.+?)\."
    r"((?P<down>(lora_A(\.(?P<down_of>[^.]+))?|lora_down|lora\.down|down)\.weight)"
    r"|(?P<up>(lora_B(\.(?P<up_of>[^.]+))?|lora_up|lora\.up|up)\.weight)"
    r"|(?P<alpha>alpha)"
    rf"|(?P<lycoris>{PARTS})"
    r"|(?P<magnitude>(?P<scale>dora_scale)|lora_magnitude_vector(\.[^.]+)?(\.weight)?))"
)
_TEXT = re.compile(
    r"(base_model\.model\.)?(lora_|lycoris_)?"
    r"(te\d?[._]|text_encoders?(_\d)?[._]|text_model[._]|clip_[lg][._]|t5(xxl)?[._]|bundle_emb\.|emb_params|string_to_)"
)


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
        raise ValueError(f"{file} is no adapter that can be read: {_other_kind(file) or f'{error}; {mend}'}") from error
    return notes


def _other_kind(file: Path) -> str | None:
    """What a file is that is no safetensors file, where its first bytes tell, and the mend."""
    return {
        "gguf": "it is a GGUF file, which holds a whole model; give a LoRA file",
        "pickle": "it is a pickle, which could run programs; ask for the .safetensors of it",
        "archive": "it is an archive; unpack it",
        "pointer": POINTER,
    }.get(kind_of_file(file))


def read_pairs(path: str, drop_text_encoder: bool = False, model: Container[str] | None = None) -> Pairs:
    """An adapter file of any format -> pairs by diffusers' names of the transformer's layers.

    model: the names of the layers of the model that it is for, where one is known; they decide where names mean
    different layers in two families and the file does not tell which family it is of.

    Raises:
        ValueError: it is unreadable, not finite or zero, half a pair is absent, a key is unknown, or nothing tells its
            family.
    """
    file = find_adapter(path)
    if is_checkpoint(file):
        own, strength = read_checkpoint(file)
        return pairs_of(own, dict.fromkeys(map(_layer, own), strength))
    try:
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
            state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no LoRA file that can be read: {_other_kind(file) or error}") from error
    text = [key for key in state if _TEXT.match(key)]
    if text and not drop_text_encoder:
        words = all(key.startswith(("bundle_emb.", "emb_params", "string_to_")) for key in text)
        what = "brings embeddings of words of its own for" if words else "adapts"
        raise ValueError(
            f"{file} {what} the text encoder too ({len(text)} tensors, such as {text[0]}), which is not done here; "
            "infer/convert.py with drop_text_encoder=true writes a file without them"
        )
    state = {key: _number(key, value) for key, value in state.items() if key not in set(text)}
    odd = [key for key, value in state.items() if not value.is_floating_point()]
    if odd:
        raise ValueError(f"{file} holds {state[odd[0]].dtype} in {odd[0]}; a LoRA file holds floating-point numbers")
    found: dict[str, dict[str, Tensor]] = {}
    unknown, adapters = [], set()
    for key in state:
        match = _KEY.fullmatch(key)
        name = _WRAPPER.sub("", match["name"]) if match else ""
        name = _PREFIX.sub("", name, count=1)
        if match is None or not families_with([name]):
            unknown.append(key)
            continue
        if match["scale"]:
            _check_scale(file, key, state[key])
        part = match["lycoris"] or next(part for part in ("down", "up", "alpha", "magnitude") if match[part])
        if part in ("down", "up"):
            adapters.add(match[f"{part}_of"] or "")
        if part in found.setdefault(name, {}) and len(adapters) == 1:
            raise ValueError(f"{file} says twice what {part} of {name} is; it mixes two formats, keep one of them")
        found[name][part] = state[key]
    if unknown or not found:
        if text and not state:
            raise ValueError(f"{file} adapts the text encoder alone, which is not done here; nothing of it is left")
        raise ValueError(
            f"{file} cannot be used: {len(unknown)} of {len(state)} keys are unknown"
            f"{' (' + min(unknown) + ', ...)' if unknown else ''}; {reason(unknown, bool(found))}"
        )
    if len(adapters) > 1:
        names = ", ".join(repr(name) for name in sorted(adapters))
        raise ValueError(f"{file} holds several adapters ({names}); save the one that is meant alone")
    bad = [key for key, value in state.items() if not value.float().isfinite().all()]
    if bad:
        raise ValueError(f"{file} is not finite in {len(bad)} tensors ({bad[0]}, ...); train it again")
    found = {name: as_lora(file, name, parts) if is_lycoris(parts) else parts for name, parts in found.items()}
    family = file_family(file, {name: _shape(file, name, found[name]) for name in sorted(found)}, model)
    strengths = Strengths(file, header, state, found, family)
    pairs: Pairs = {}
    for name in sorted(found):
        for layer, pair in _split(file, name, found[name], family, strengths).items():
            if layer in pairs:
                raise ValueError(f"{file} says twice what {layer} gets; it mixes two formats, keep one of them")
            pairs[layer] = pair
    if not any(bool(pair.up.any()) and bool(pair.down.any()) for pair in pairs.values()):
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


def _check_scale(file: Path, key: str, scale: Tensor) -> None:
    """LyCORIS and OneTrainer write DoRA's magnitude of rows as [out, 1], which is PEFT's, and of columns as [1, in].

    Raises:
        ValueError: it is of columns, or nothing tells.
    """
    if scale.ndim != 2 or scale.shape[1] != 1:
        raise ValueError(
            f"{file} is DoRA whose magnitude {key} of the shape {list(scale.shape)} is not one of rows, [out, 1], "
            "which alone is read here; train it with the magnitude over outputs (LyCORIS' wd_on_out=True), or merge it "
            "with the program that made it"
        )


def _number(key: str, value: Tensor) -> Tensor:
    """A tensor in a type that can be reckoned with: fp8 in bf16, which holds all its numbers, whole alphas in fp32."""
    import torch

    if "float8" in str(value.dtype):
        return value.to(torch.bfloat16)
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    return value.float() if whole and key.endswith(".alpha") and value.numel() == 1 else value


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
