"""What an attached adapter holds: its tensors, its strength in every layer, its norm, and the file that it becomes.

A saved adapter is `pytorch_lora_weights.safetensors` in diffusers' keys with its strength (alpha / rank, or alpha /
sqrt(rank)) multiplied into B: every loader takes a missing alpha as strength 1, so all of them draw the same picture.
"""

import math
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from infer.adapter.factors import Factors, turn, update
from infer.adapter.read import FILE, Pairs, pairs_of
from infer.adapter.tuner import attached_layers, factors_of, kind_attached, set_factors
from infer.adapter.write import write_own


def adapter_state(transformer: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's own tensors under PEFT's names, on the CPU; what a checkpoint keeps."""
    if kind_attached(transformer, name) != "lora":
        factors = factors_of(transformer, name)
        return {f"{layer}.{part}": value for layer, parts in factors.layers.items() for part, value in parts.items()}
    state = get_peft_model_state_dict(transformer, adapter_name=name)
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}


def set_adapter_state(transformer: nn.Module, state: dict[str, Tensor], name: str = "default") -> None:
    """Put `adapter_state` back into an attached adapter, every tensor of it and no other."""
    from peft.utils import set_peft_model_state_dict

    attached = adapter_state(transformer, name)
    if attached.keys() != state.keys() or any(attached[key].shape != state[key].shape for key in attached):
        raise ValueError("the checkpoint's adapter has other layers or another rank than the run's config asks for")
    if kind_attached(transformer, name) != "lora":
        set_factors(transformer, state, name)
        return
    set_peft_model_state_dict(transformer, state, adapter_name=name)


def strengths(transformer: nn.Module, name: str = "default") -> dict[str, float]:
    """For every adapted layer, alpha / rank (with rsLoRA alpha / sqrt(rank)) times the weight that it is on with."""
    if kind_attached(transformer, name) != "lora":
        return attached_layers(transformer, name)
    return {
        layer: float(module.scaling[name])
        for layer, module in transformer.named_modules()
        if name in getattr(module, "scaling", {})
    }


def adapter_pairs(transformer: nn.Module, name: str = "default") -> Pairs:
    """An attached adapter as pairs, on the CPU."""
    return pairs_of(adapter_state(transformer, name), strengths(transformer, name))


def save_adapter(transformer: nn.Module, folder: Path, notes: dict[str, Any], name: str = "default") -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` whole or not at all; `notes` go into its header as JSON.

    Raises:
        ValueError: a value is not finite.
    """
    if kind_attached(transformer, name) != "lora":
        return write_own(factors_of(transformer, name), folder / FILE, notes)
    pairs = adapter_pairs(transformer, name)
    parts = {layer: [pair.down, pair.up, pair.magnitude] for layer, pair in pairs.items()}
    bad = [layer for layer, own in parts.items() if not all(x is None or x.isfinite().all() for x in own)]
    if bad:
        raise ValueError(f"the adapter is not finite in {len(bad)} layers ({bad[0]}, ...); nothing was written")
    # diffusers reads `lora_adapter_metadata` only: these notes change nothing for it
    return write_own(pairs, folder / FILE, notes)


def update_norm(transformer: nn.Module, name: str = "default") -> float:
    """Frobenius norm of strength x B A over all layers, without forming the products; of OFT that of R - I, as it adds
    nothing that does not depend on the weights.

    ||B A||_F^2 = sum((B^T B) * (A A^T)).
    """
    if kind_attached(transformer, name) != "lora":
        return factors_norm(factors_of(transformer, name))
    total = 0.0
    for pair in adapter_pairs(transformer, name).values():
        down, up = pair.down.double(), pair.up.double()
        total += pair.strength**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return math.sqrt(max(total, 0.0))


def factors_norm(factors: Factors) -> float:
    """Frobenius norm of what LoKr or LoHa adds, or of OFT's R - I, over all layers."""
    total = 0.0
    for layer, parts in factors.layers.items():
        wide = {part: value.double() for part, value in parts.items()}
        whole = turn(wide["oft_R.weight"]) if factors.kind == "oft" else factors.strengths[layer] * update(wide)
        total += float(whole.square().sum())
    return math.sqrt(total)
