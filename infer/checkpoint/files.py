"""A checkpoint's folders and JSON files, on disk or on the Hub (downloaded when they are asked for)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infer.checkpoint.hub import hub_file, hub_part
from infer.checkpoint.load_errors import loading
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import shape_config


def read_config(model: Model, part: str) -> dict[str, Any]:
    """A part's config.json."""
    if model.random:
        return shape_config(model.path, part)
    with loading(model.path, model.local is not None, part):
        config: dict[str, Any] = json.loads(_config_file(model, part).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"config.json of the {part} of {model.path} is no JSON object; copy the checkpoint again")
    return config


def _config_file(model: Model, part: str) -> Path:
    if model.local is not None:
        return model.local / part / "config.json"
    return hub_file(model.path, model.revision, f"{part}/config.json")


def part_folder(model: Model, part: str) -> Path:
    """The folder of a part, downloaded if the model is on the Hub and not here yet."""
    if model.local is not None:
        return model.local / part
    with loading(model.path, False, part):
        return hub_part(model.path, model.revision, part)


def pipeline_index(model: Model) -> dict[str, Any]:
    """model_index.json: the classes of the parts."""
    with loading(model.path, model.local is not None, "index"):
        if model.local is not None:
            file = model.local / "model_index.json"
        else:
            file = hub_file(model.path, model.revision, "model_index.json")
        index: dict[str, Any] = json.loads(file.read_text())
    return index
