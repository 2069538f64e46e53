"""LoRA files of any program -> pairs: diffusers', PEFT's, kohya's, ComfyUI's, Black Forest Labs' and XLabs' names.

What a file holds is, for each layer, a pair A and B and a strength: the layer becomes W + strength x B A. Files differ
in the layers' names (infer/adapter/layer_names.py), in what they fuse, and in where the strength stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from infer.adapter.foreign_files import reason
from infer.adapter.layer_names import halves_swapped, layers_of
from infer.family.family import Linear
from infer.program.paths import is_hub_id, kind_of_file

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

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
    r"|(?P<magnitude>lora_magnitude_vector(\.[^.]+)?(\.weight)?))"
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
    """The adapter's file from a path to it or to its folder.

    Raises:
        ValueError: there is none.
    """
    file = Path(path)
    if file.is_dir():
        candidates = [file / FILE, file / "adapter" / FILE, file / PEFT_FILE]
        file = next((c for c in candidates if c.is_file()), candidates[0])
    if not file.is_file():
        mend = f"give a .safetensors file or a folder that holds {FILE}"
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
        raise ValueError(
            f"{file} is no adapter that can be read ({error}); take it away: train.py makes it again from the last "
            "checkpoint"
        ) from error
    return notes


def read_pairs(path: str, drop_text_encoder: bool = False) -> Pairs:
    """An adapter file of any format -> pairs by diffusers' names of the transformer's layers.

    Raises:
        ValueError: it is unreadable, not finite or zero, half a pair is absent, or a key is unknown.
    """
    file = find_adapter(path)
    try:
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
            state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        kind = kind_of_file(file)
        what = {
            "gguf": "a GGUF file, which holds a whole model",
            "pickle": "a pickle, which could run programs; ask for the .safetensors of it",
            "archive": "an archive; unpack it",
        }.get(kind, str(error))
        raise ValueError(f"{file} is no LoRA file that can be read: {what}") from error
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
        if match is None or not layers_of(name):
            unknown.append(key)
            continue
        part = next(part for part in ("down", "up", "alpha", "magnitude") if match[part])
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
    strengths = _Strengths(file, header, state, found)
    pairs: Pairs = {}
    for name in sorted(found):
        for layer, pair in _split(file, name, found[name], strengths).items():
            if layer in pairs:
                raise ValueError(f"{file} says twice what {layer} gets; it mixes two formats, keep one of them")
            pairs[layer] = pair
    if not any(bool(pair.up.any()) and bool(pair.down.any()) for pair in pairs.values()):
        raise ValueError(f"{file} is zero in every layer: it would draw the base model; train it again")
    if len({pair.magnitude is None for pair in pairs.values()}) > 1:
        raise ValueError(f"{file} is DoRA in some layers and LoRA in others, which cannot be loaded; train it again")
    return pairs


def check_fit(pairs: Pairs, layers: Mapping[str, Linear], path: str) -> None:
    """Compare pairs with the layers that they are for.

    Raises:
        ValueError: a layer is unknown to the transformer, or has other features.
    """
    unknown = [layer for layer in pairs if layer not in layers]
    if unknown:
        raise ValueError(
            f"{path} does not fit this model: {len(unknown)} of {len(pairs)} layers are unknown to it "
            f"({unknown[0]}, ...); choose the adapter's own base model"
        )
    for name, pair in pairs.items():
        wide, narrow = pair.up.shape[0], pair.down.shape[1]
        layer = layers[name]
        if (wide, narrow) != layer:
            raise ValueError(
                f"{path} does not fit this model at {name}: it maps {narrow} to {wide} features where the layer maps "
                f"{layer.columns} to {layer.rows}; choose the adapter's own base model"
            )


def _number(key: str, value: Tensor) -> Tensor:
    """A tensor in a type that can be reckoned with: fp8 in bf16, which holds all its numbers, whole alphas in fp32."""
    import torch

    if "float8" in str(value.dtype):
        return value.to(torch.bfloat16)
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    return value.float() if whole and key.endswith(".alpha") and value.numel() == 1 else value


def _object(file: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the configuration in {file} is no JSON ({error}); save the adapter again") from error
    if not isinstance(value, dict):
        raise ValueError(f"the configuration in {file} is no JSON object; save the adapter again")
    return value


class _Strengths:
    """A layer's strength: of its alpha key, of the file's configuration, or 1."""

    def __init__(self, file: Path, header: dict[str, str], state: Iterable[str], names: Iterable[str]) -> None:
        """state: the file's keys. names: what they adapt, without prefixes."""
        self.file = file
        config = _object(file, header.get("lora_adapter_metadata", "{}"))
        self.config = {key.removeprefix("transformer."): value for key, value in config.items()}
        beside = file.with_name(PEFT_CONFIG)
        peft = any(key.startswith("base_model.model.") for key in state)
        if not peft or self.config or any(key.endswith(".alpha") for key in state):
            return
        if beside.is_file():
            self.config = _object(beside, beside.read_text(errors="replace"))
        elif any(layers_of(name) == (name,) for name in names):
            # with Black Forest Labs' names and nothing beside them, programs write B at its whole strength
            raise ValueError(f"{file} is PEFT's, whose strength stands in {PEFT_CONFIG}; put that file beside it")

    def __call__(self, layer: str, name: str, rank: int, alpha: Tensor | None) -> float:
        """layer: diffusers' name. name: the file's own."""
        try:
            return self._strength(layer, name, rank, alpha)
        except (TypeError, AttributeError, RuntimeError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(f"{self.file} does not say how strong {layer} is ({error}); train it again") from error

    def _strength(self, layer: str, name: str, rank: int, alpha: Tensor | None) -> float:
        from peft.utils.other import get_pattern_key

        said = None
        if self.config.get("lora_alpha") is not None:
            patterns = self.config.get("alpha_pattern") or {}
            keys = (get_pattern_key(patterns, each) for each in (name, layer))
            whole = next((patterns[key] for key in keys if key in patterns), self.config["lora_alpha"])
            said = float(whole) / (rank**0.5 if self.config.get("use_rslora") else rank)
        if alpha is None:
            return 1.0 if said is None else said
        strength = float(alpha) / rank
        if said is not None and abs(strength - said) > 1e-3 * abs(strength):
            raise ValueError(f"{self.file} gives {layer} two strengths, {strength} and {said}; remove one of them")
        return strength


def _split(file: Path, name: str, parts: dict[str, Tensor], strengths: _Strengths) -> Pairs:
    """One name's tensors -> the pairs of the layers that it means."""
    if "down" not in parts or "up" not in parts:
        there, absent = ("B", "A") if "up" in parts else ("A" if "down" in parts else "alpha", "B")
        raise ValueError(f"{file} has {there} but no {absent} for {name}: half a pair; copy or train it again")
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(f"{file}: A {tuple(down.shape)} and B {tuple(up.shape)} of {name} are no pair of one rank")
    layers = layers_of(name)
    strength = strengths(layers[0], name, down.shape[0], parts.get("alpha"))
    if len(layers) == 1:
        if halves_swapped(name):
            up = up.roll(up.shape[0] // 2, 0)
        magnitude = parts.get("magnitude")
        return {layers[0]: Pair(down, up, strength, None if magnitude is None else magnitude.flatten())}
    width = down.shape[1]
    rows = [width, width, width, up.shape[0] - 3 * width][: len(layers)]
    if "magnitude" in parts or sum(rows) != up.shape[0] or rows[-1] <= 0:
        raise ValueError(f"{file} does not fit this model at {name}: B has {up.shape[0]} rows for {width} features")
    found = {}
    for layer, part in zip(layers, up.split(rows), strict=True):
        used = part.any(0)  # of a block-diagonal B, each layer's own columns
        if used.any():
            found[layer] = Pair(down[used], part[:, used].contiguous(), strength)
    return found or {layer: Pair(down, part, strength) for layer, part in zip(layers, up.split(rows), strict=True)}
