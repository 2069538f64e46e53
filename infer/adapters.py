"""LoRA adapters on a quantized transformer: attach, measure, save for plain diffusers, load, switch.

A saved adapter is `pytorch_lora_weights.safetensors` in diffusers' keys with its strength (alpha / rank, or alpha /
sqrt(rank)) multiplied into B: every loader takes a missing alpha as strength 1, so all of them draw the same picture.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from infer.atomic import replace_file
from infer.quantize import linear_layers

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
MLP = r"(ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
BLOCKS = r"(transformer_blocks|single_transformer_blocks)\.\d+\."
PRESETS = {
    "attention": BLOCKS + ATTENTION,
    "attention+mlp": f"{BLOCKS}({ATTENTION}|{MLP})",
    "double": rf"transformer_blocks\.\d+\.({ATTENTION}|{MLP})",
    "single": rf"single_transformer_blocks\.\d+\.({ATTENTION}|{MLP})",
    "all": ".*",
}
INITS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


@dataclass
class Adapter:
    """A LoRA adapter (Hu et al. 2021) to train."""

    rank: int = 16
    alpha: float = 16.0
    """Strength: the update is alpha / rank x B A."""
    dropout: float = 0.0
    rslora: bool = False
    """Strength alpha / sqrt(rank) (Kalajdzievski 2023), so that high ranks learn as fast."""
    dora: bool = False
    """Learn each weight column's magnitude apart from its direction (Liu et al. 2024); slower."""
    init: str = "default"
    """default (Kaiming-uniform A, zero B), gaussian (normal A, zero B) or orthogonal."""
    targets: str = "attention"
    """A preset (attention, attention+mlp, double, single, all) or a regular expression over whole layer names."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank is {self.rank}; it must be 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha is {self.alpha}; it must be above 0 (alpha = rank is strength 1)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.init not in INITS:
            raise ValueError(f"adapter.init is {self.init!r}; choose one of {', '.join(INITS)}")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"adapter.rank is {self.rank}; orthogonal initialisation needs an even rank")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"adapter.targets {self.targets!r} is neither a preset ({', '.join(PRESETS)}) nor a regular "
                f"expression: {error}"
            ) from error


def match_targets(transformer: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers that a preset or a regular expression means.

    Raises:
        ValueError: none; the message lists what there is.
    """
    layers = linear_layers(transformer)
    pattern = re.compile(PRESETS.get(targets, targets))
    found = [name for name in layers if pattern.fullmatch(name)]
    if not found:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers})
        raise ValueError(
            f"adapter.targets {targets!r} matches no linear layer. Presets: {', '.join(PRESETS)}. "
            f"Layers (write a number or \\d+ for *): {', '.join(kinds)}"
        )
    return found


def attach(
    transformer: FluxTransformer2DModel, adapter: Adapter, seed: int, name: str = "default"
) -> list[nn.Parameter]:
    """Freeze the transformer, add a trainable adapter in fp32 and return its parameters.

    fp32 because a small update to a bf16 weight rounds to nothing (PEFT starts in bf16 beside 4-bit layers).
    """
    targets = match_targets(transformer, adapter.targets)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=INITS[adapter.init],
        # as a pattern: PEFT takes each name of a list for an ending, and `proj_out` ends many
        target_modules="|".join(map(re.escape, targets)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=name)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    attached = len(strengths(transformer, name))
    assert attached == len(targets), f"{attached} layers were adapted instead of {len(targets)}"
    return parameters


def adapter_state(transformer: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's own tensors under PEFT's names, on the CPU; what a checkpoint keeps."""
    state = get_peft_model_state_dict(transformer, adapter_name=name)
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}


def set_adapter_state(transformer: nn.Module, state: dict[str, Tensor], name: str = "default") -> None:
    """Put `adapter_state` back into an attached adapter, every tensor of it and no other."""
    from peft.utils import set_peft_model_state_dict

    own = adapter_state(transformer, name)
    if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
        raise ValueError("the checkpoint's adapter has other layers or another rank than the run's config asks for")
    set_peft_model_state_dict(transformer, state, adapter_name=name)


def strengths(transformer: nn.Module, name: str = "default") -> dict[str, float]:
    """For every adapted layer, alpha / rank (or with rsLoRA alpha / sqrt(rank))."""
    return {
        layer: float(module.scaling[name])
        for layer, module in transformer.named_modules()
        if name in getattr(module, "scaling", {})
    }


def portable_state(transformer: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter in diffusers' keys, strength multiplied into B."""
    scale = strengths(transformer, name)
    state = {}
    for key, value in adapter_state(transformer, name).items():
        layer = key.split(".lora_")[0]
        state[f"transformer.{key}"] = value * scale[layer] if ".lora_B." in key else value
    return state


def save_adapter(transformer: nn.Module, folder: Path, notes: dict[str, Any], name: str = "default") -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` whole or not at all; `notes` go into its header as JSON.

    Raises:
        ValueError: a value is not finite.
    """
    state = portable_state(transformer, name)
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"the adapter is not finite in {len(bad)} tensors ({bad[0]}, ...); nothing was written")
    file = folder / FILE
    # diffusers reads `lora_adapter_metadata` only: these notes change nothing for it
    content = save(state, metadata={"format": "pt", "flux_lora": json.dumps(notes, sort_keys=True)})
    replace_file(file, lambda path: path.write_bytes(content))
    return file


def find_adapter(path: str) -> Path:
    """The adapter's file from a path to it or to its folder.

    Raises:
        ValueError: there is none.
    """
    file = Path(path)
    if file.is_dir():
        candidates = [file / FILE, file / "adapter" / FILE]
        file = next((c for c in candidates if c.is_file()), candidates[0])
    if not file.is_file():
        raise ValueError(f"there is no adapter at {file}; give a .safetensors file or a folder that holds {FILE}")
    return file


def read_notes(file: Path) -> dict[str, Any]:
    """What `save_adapter` noted in the header; empty for other programs' files."""
    with safe_open(file, framework="pt") as reader:
        notes: dict[str, Any] = json.loads((reader.metadata() or {}).get("flux_lora", "{}"))
    return notes


def load_adapter(transformer: FluxTransformer2DModel, path: str, name: str) -> int:
    """Load an adapter file (diffusers' keys, or others that diffusers converts) and switch it on; returns its layers.

    Raises:
        ValueError: the file is unreadable, not finite, all zero, or does not fit this transformer.
    """
    if name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"there is an adapter {name!r} already; give this one another name")
    file = find_adapter(path)
    try:
        state, alphas, metadata = FluxPipeline.lora_state_dict(
            str(file), return_alphas=True, return_lora_metadata=True, use_safetensors=True
        )
    except Exception as error:  # every format's converter raises something else
        raise ValueError(f"{file} is no LoRA file that can be read: {error}") from error
    ups = {key: value for key, value in state.items() if ".lora_B." in key}
    layer_of = {key: key.removeprefix("transformer.").split(".lora_B.")[0] for key in ups}
    # where an adapter sits already, the layer itself is its `base_layer`
    layers = {own.removesuffix(".base_layer"): layer for own, layer in linear_layers(transformer).items()}
    unknown = [key for key in ups if layer_of[key] not in layers]
    if not ups or unknown:
        raise ValueError(
            f"{file} does not fit this model: {len(unknown)} of {len(ups)} layers are unknown to it"
            f"{' (' + unknown[0] + ', ...)' if unknown else ''}; choose the adapter's own base model"
        )
    bad = [key for key, value in state.items() if not value.float().isfinite().all()]
    if bad:
        raise ValueError(f"{file} is not finite in {len(bad)} tensors ({bad[0]}, ...); train it again")
    if not any(bool(value.any()) for value in ups.values()):
        raise ValueError(f"{file} is zero in every layer: it would draw the base model; train it again")
    for key, value in ups.items():
        layer = layers[layer_of[key]]
        down = state.get(key.replace(".lora_B.", ".lora_A."))
        if down is None or value.shape[0] != layer.out_features or down.shape[1] != layer.in_features:
            raise ValueError(
                f"{file} does not fit this model at {key}: it has shape {tuple(value.shape)} where the layer maps "
                f"{layer.in_features} to {layer.out_features} features; choose the adapter's own base model"
            )
    FluxPipeline.load_lora_into_transformer(state, alphas, transformer, adapter_name=name, metadata=metadata)
    attached = strengths(transformer, name)
    assert len(attached) == len(ups), f"{len(attached)} of {len(ups)} layers were attached"
    return len(ups)


def update_norm(transformer: nn.Module, name: str = "default") -> float:
    """Frobenius norm of strength x B A over all layers, without forming the products.

    ||B A||_F^2 = sum((B^T B) * (A A^T)).
    """
    state, scale = adapter_state(transformer, name), strengths(transformer, name)
    total = 0.0
    for key, up in state.items():
        if ".lora_B." not in key:
            continue
        down = state[key.replace(".lora_B.", ".lora_A.")].double()
        up = up.double()
        total += scale[key.split(".lora_")[0]] ** 2 * float(((up.T @ up) * (down @ down.T)).sum())
    return math.sqrt(max(total, 0.0))


def switch(transformer: FluxTransformer2DModel, on: bool) -> None:
    """Adapters on or off; off restores the base model's output bit for bit."""
    if on:
        transformer.enable_adapters()
    else:
        transformer.disable_adapters()
