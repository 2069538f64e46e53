"""A training's checkpoint, runs/<run>/checkpoints/step-000200/, read as an adapter: its weights or their average.

Its tensors have PEFT's names and say no strength: that stands in the run's config.yaml.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from infer.adapter.lora import FROM_ERROR

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, AVERAGE, STATE = "adapter.safetensors", "ema.safetensors", "state.json"


def is_checkpoint(file: Path) -> bool:
    """Whether a file holds the weights of a run's checkpoint, or their average."""
    if file.name not in (WEIGHTS, AVERAGE):
        return False
    folder = file.absolute().parent
    return bool(re.fullmatch(r"step-\d+", folder.name)) and folder.parent.name == "checkpoints"


def strength_of(adapter: dict[str, Any]) -> float:
    """What the recorded settings multiply B A with: alpha / rank, with rsLoRA alpha / sqrt(rank); OFT's is 1."""
    if adapter.get("kind") == "oft":
        return 1.0
    rank, alpha = int(adapter["rank"]), float(adapter["alpha"])
    return alpha / (math.sqrt(rank) if adapter.get("rslora") else rank)


def read_checkpoint(file: Path) -> tuple[str, dict[str, Tensor], float]:
    """A checkpoint's kind of adapter, its weights, or their average, under PEFT's names, and their strength in every
    layer.

    Raises:
        ValueError: it is damaged, its run's settings cannot be read, or it is only a part of what was trained.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    config = file.absolute().parents[2] / "config.yaml"
    try:
        adapter = yaml.safe_load(config.read_bytes())["adapter"]
        strength, init = strength_of(adapter), adapter.get("init")
        kind = str(adapter.get("kind", "lora"))
        recovery = adapter.get("recovery")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} is a checkpoint whose strength stands in {config}, which cannot be read ({error}); put it back"
        ) from error
    if init in FROM_ERROR or recovery:
        raise ValueError(
            f"{file} is a checkpoint of a run that starts from the quantization's error (adapter.init or "
            "adapter.recovery), and does not hold that part; use the run's adapter"
        )
    try:
        content = file.read_bytes()
        sums = json.loads(file.with_name(STATE).read_bytes())["sha256"]
        if hashlib.sha256(content).hexdigest() != sums[file.name]:
            raise ValueError("its checksum differs from what was written")
        return kind, load(content), strength
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {file.parent} is damaged ({error}); choose another one") from error
