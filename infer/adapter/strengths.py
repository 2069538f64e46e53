"""How strong an adapter's file says that a layer's update is: alpha / rank, or what a configuration beside it says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.adapter.layer_names import layers_of
from infer.family.family import Family

if TYPE_CHECKING:
    from torch import Tensor

PEFT_CONFIG = "adapter_config.json"


class Strengths:
    """A layer's strength: of its alpha key, of the file's configuration, or 1."""

    def __init__(
        self, file: Path, header: dict[str, str], state: Iterable[str], names: Iterable[str], family: Family
    ) -> None:
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
        elif any(layers_of(name, family) == (name,) for name in names):
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


def _object(file: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the configuration in {file} is no JSON ({error}); save the adapter again") from error
    if not isinstance(value, dict):
        raise ValueError(f"the configuration in {file} is no JSON object; save the adapter again")
    return value
