"""Adapters -> files for other programs: diffusers', PEFT's, kohya's, ComfyUI's, ai-toolkit's and LyCORIS'.

diffusers' and PEFT's files name its layers; the others name Black Forest Labs', which fuse several: of q, k and v with
an A each, B is block-diagonal and the rank the sum of theirs. kohya's and ComfyUI's say the strength as an alpha;
ai-toolkit's has it in B, which is the one way that ComfyUI and diffusers' loader for FLUX.2 both read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.adapter.factors import Factors
from infer.adapter.layer_names import families_with, halves_swapped, original_name, rows_within
from infer.adapter.lycoris import dim_of
from infer.adapter.read import PEFT_FILE, Pairs
from infer.family.family import Family
from infer.program.atomic import replace_file

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

FORMATS = ("diffusers", "peft", "kohya", "comfyui", "ai-toolkit", "lycoris")


def lora_config(pairs: Pairs) -> LoraConfig:
    """PEFT's configuration of pairs: every layer by its whole name, with its own rank and alpha."""
    from peft import LoraConfig

    ranks = {layer: pair.down.shape[0] for layer, pair in pairs.items()}
    alphas = {layer: pair.strength * pair.down.shape[0] for layer, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=int(rank),
        lora_alpha=alpha,
        # from the name's start on: PEFT would take `proj_out` for the end of a longer one
        rank_pattern={f"^{re.escape(layer)}": value for layer, value in ranks.items() if value != rank},
        alpha_pattern={f"^{re.escape(layer)}": value for layer, value in alphas.items() if value != alpha},
        use_dora=next(iter(pairs.values())).magnitude is not None,
        target_modules="|".join(map(re.escape, pairs)),
    )


def scaled(up: Tensor, strength: float) -> Tensor:
    """B with the strength in it, in its own dtype if nothing is lost, else in fp32."""
    import torch

    exact = up.float() * strength
    low = exact.to(up.dtype)
    return low if torch.equal(low.float(), exact) else exact


def write_pairs(pairs: Pairs, form: str, out: Path, notes: dict[str, Any]) -> Path:
    """Write a file (for PEFT a folder) of a format, whole or not at all; returns what plain programs are given.

    Raises:
        ValueError: the format is unknown, or cannot hold these pairs.
    """
    import torch

    from infer.program.safetensors_bytes import packed

    if form not in FORMATS:
        raise ValueError(f"to is {form!r}; choose one of {', '.join(FORMATS)}")
    if form in ("comfyui", "ai-toolkit") and any(pair.magnitude is not None for pair in pairs.values()):
        raise ValueError(
            f"{form} files hold no DoRA as it is learned here: ComfyUI divides a row by the length that it had without "
            "the adapter; use to=diffusers, peft, kohya or lycoris, or merge it"
        )
    header = _header(notes)
    if form == "peft":
        config = lora_config(pairs)
        config.inference_mode = True
        state = _named(pairs, "base_model.model.", baked=False)
        out.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(out)
        out = out / PEFT_FILE
    elif form == "lycoris":
        state = _lycoris(pairs)
    elif form == "diffusers" or (form == "ai-toolkit" and not _toolkit_names(pairs)):
        state = _named(pairs, "transformer.", baked=True)
    else:
        state = _fused(pairs, form)
    content = packed({key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}, header)
    replace_file(out, lambda path: path.write_bytes(content))
    return out.parent if form == "peft" else out


def _header(notes: dict[str, Any]) -> dict[str, str]:
    return {"format": "pt", "flux_lora": json.dumps(notes, sort_keys=True)}


def _named(pairs: Pairs, prefix: str, baked: bool) -> dict[str, Tensor]:
    """diffusers' layer names; the strength in B, or left to a configuration."""
    state = {}
    for layer, pair in pairs.items():
        state[f"{prefix}{layer}.lora_A.weight"] = pair.down
        state[f"{prefix}{layer}.lora_B.weight"] = scaled(pair.up, pair.strength) if baked else pair.up
        if pair.magnitude is not None:
            state[f"{prefix}{layer}.lora_magnitude_vector"] = pair.magnitude
    return state


def _toolkit_names(pairs: Pairs) -> bool:
    """Whether ai-toolkit's files of these layers name them as Black Forest Labs does; else as diffusers does."""
    return any(family.NAMES.ai_toolkit for family in families_with(pairs))


def _fused(pairs: Pairs, form: str) -> dict[str, Tensor]:
    """Black Forest Labs' layers under the keys of kohya, ComfyUI or ai-toolkit."""
    import torch

    family, *_ = families_with(pairs)
    groups = dict(original_name(layer) for layer in pairs)
    state: dict[str, Tensor] = {}
    for name, layers in groups.items():
        down, up, strength = _joined(pairs, layers, family)
        if halves_swapped(name):
            up = up.roll(up.shape[0] // 2, 0)
        key = f"lora_unet_{name.replace('.', '_')}" if form == "kohya" else f"diffusion_model.{name}"
        if form == "ai-toolkit":
            state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": scaled(up, strength)}
            continue
        if any(pairs[layer].magnitude is not None for layer in layers if layer in pairs):
            state[f"{key}.dora_scale"] = _joined_magnitude(pairs, name, layers)
        state[f"{key}.lora_down.weight"] = down
        state[f"{key}.lora_up.weight"] = up
        state[f"{key}.alpha"] = torch.tensor(strength * down.shape[0], dtype=torch.float32)
    return state


def _joined_magnitude(pairs: Pairs, name: str, layers: tuple[str, ...]) -> Tensor:
    """DoRA's magnitude of the rows of the one layer that holds these, [out, 1] as LyCORIS writes it.

    Raises:
        ValueError: a layer has none: its rows' own lengths are not known.
    """
    import torch

    absent = [layer for layer in layers if layer not in pairs]
    if absent:
        raise ValueError(
            f"kohya's {name} holds {absent[0]} too, which this DoRA has not, and the magnitude of its rows is not "
            "known; use to=lycoris, diffusers or peft"
        )
    magnitudes = [pairs[layer].magnitude for layer in layers]
    whole = torch.cat([each.flatten() for each in magnitudes if each is not None])
    return (whole.roll(len(whole) // 2) if halves_swapped(name) else whole)[:, None]


def _lycoris(pairs: Pairs) -> dict[str, Tensor]:
    """LyCORIS' names for LoRA, which it calls LoCon: diffusers' layers, as SimpleTuner writes them."""
    import torch

    state = {}
    for layer, pair in pairs.items():
        key = lycoris_name(layer)
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = pair.down, pair.up
        state[f"{key}.alpha"] = torch.tensor(pair.strength * pair.down.shape[0], dtype=torch.float32)
        if pair.magnitude is not None:
            state[f"{key}.dora_scale"] = pair.magnitude.flatten()[:, None]
    return state


def lycoris_name(layer: str) -> str:
    """What LyCORIS calls a layer of diffusers', as SimpleTuner does, and ComfyUI reads."""
    return f"lycoris_{layer.replace('.', '_')}"


def write_own(adapter: Pairs | Factors, out: Path, notes: dict[str, Any]) -> Path:
    """Write an adapter in the format that it is saved in: diffusers', or of `write_factors`."""
    if isinstance(adapter, Factors):
        return write_factors(adapter, out, notes)
    return write_pairs(adapter, "diffusers", out, notes)


def write_factors(factors: Factors, out: Path, notes: dict[str, Any]) -> Path:
    """Write LoKr or LoHa in LyCORIS' names, OFT in OneTrainer's (which are PEFT's), whole or not at all.

    LyCORIS' own OFT turns what a layer writes, so that its names would mean something else.

    Raises:
        ValueError: a value is not finite.
    """
    import torch

    from infer.program.safetensors_bytes import packed

    state: dict[str, Tensor] = {}
    for layer, own in factors.layers.items():
        parts, strength = dict(own), factors.strengths[layer]
        if factors.kind == "oft":
            state |= {f"transformer.{layer}.{part}": value for part, value in parts.items()}
            continue
        dim = dim_of(parts)
        if dim is None:  # both factors are whole: everybody takes strength 1, whatever alpha says
            parts["lokr_w1"] = scaled(parts["lokr_w1"], strength)
            dim, strength = 1, 1.0
        state |= {f"{lycoris_name(layer)}.{part}": value for part, value in parts.items()}
        state[f"{lycoris_name(layer)}.alpha"] = torch.tensor(strength * dim, dtype=torch.float32)
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"the adapter is not finite in {len(bad)} tensors ({bad[0]}, ...); nothing was written")
    content = packed({key: value.contiguous() for key, value in state.items()}, _header(notes))
    replace_file(out, lambda path: path.write_bytes(content))
    return out


def _joined(pairs: Pairs, layers: tuple[str, ...], family: Family) -> tuple[Tensor, Tensor, float]:
    """A, B and strength of the one layer that holds these; where their A differ, B is block-diagonal."""
    import torch

    there = [pairs[layer] for layer in layers if layer in pairs]
    if len(layers) == 1:
        return there[0][:3]
    strength = there[0].strength if len({pair.strength for pair in there}) == 1 else 1.0
    ups = [pair.up if pair.strength == strength else scaled(pair.up, pair.strength) for pair in there]
    shared = all(torch.equal(pair.down, there[0].down) for pair in there)
    width = there[0].down.shape[1]
    down = there[0].down if shared else torch.cat([pair.down for pair in there])
    rows = rows_within(layers, family, width)
    up = torch.zeros(sum(rows), down.shape[0], dtype=reduce(torch.promote_types, (part.dtype for part in ups)))
    row = column = 0
    for layer, count in zip(layers, rows, strict=True):
        if layer in pairs:
            part = ups.pop(0)
            up[row : row + count, column : column + part.shape[1]] = part
            column += 0 if shared else part.shape[1]
        row += count
    return down, up, strength
