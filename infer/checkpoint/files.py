"""A checkpoint's folders and JSON files, on disk or on the Hub (downloaded when they are asked for)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infer.checkpoint.hub import hub_file, hub_part
from infer.checkpoint.load_errors import loading
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import shape_config
from infer.checkpoint.sources import rest_of
from infer.family.find import SIZES, of_config
from infer.single_file.contents import base_in
from infer.single_file.header import read_header
from infer.single_file.transformer import file_config


def read_config(model: Model, part: str) -> dict[str, Any]:
    """A part's config.json."""
    if model.random:
        return shape_config(model.path, part)
    if part == "transformer" and model.file is not None:
        return _config_of_file(model, model.file)
    model = rest_of(model)
    with loading(model.path, model.local is not None, part):
        config: dict[str, Any] = json.loads(_config_file(model, part).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"config.json of the {part} of {model.path} is no JSON object; copy the checkpoint again")
    return config


def known_config(model: Model, part: str) -> dict[str, Any]:
    """A part's config: of published checkpoints that are not here from our table, else from the checkpoint."""
    rest = rest_of(model)
    if rest.local is None and rest.path in SIZES and not (part == "transformer" and model.file is not None):
        return shape_config(rest.path, part)
    return read_config(model, part)


def _config_of_file(model: Model, file: Path) -> dict[str, Any]:
    """The transformer's config: what is in a single file, and for what no size says, the other parts' checkpoint.

    Raises:
        ValueError: that is of another family, or the file lacks a tensor.
    """
    found, rest = base_in(file), rest_of(model)
    if rest.local is None and rest.path in SIZES:  # no network
        given = SIZES[rest.path]["transformer"]
    elif rest.local is not None and not (rest.local / "transformer" / "config.json").is_file():
        given = next(iter(found.family.SIZES.values()))["transformer"]
    else:
        given = read_config(rest, "transformer")
    other = of_config(given)
    if other is not found.family:
        raise ValueError(
            f"model.path {file} holds the transformer of {found.family.NAME}, and model.parts {rest.path} is of "
            f"{other.NAME}; name a checkpoint of {found.family.NAME}"
        )
    try:
        return file_config(read_header(file), found, given)
    except ValueError as error:
        raise ValueError(f"model.path {file}: {error}") from error


def _config_file(model: Model, part: str) -> Path:
    if model.local is not None:
        return model.local / part / "config.json"
    return hub_file(model.path, model.revision, f"{part}/config.json")


def part_folder(model: Model, part: str) -> Path:
    """The folder of a part, downloaded if the model is on the Hub and not here yet; of a part whose weights are in a
    single file, the one with its config."""
    model = rest_of(model)
    if model.local is not None:
        return model.local / part
    with loading(model.path, False, part):
        return hub_part(model.path, model.revision, part)


def pipeline_index(model: Model) -> dict[str, Any]:
    """model_index.json: the classes of the parts."""
    model = rest_of(model)
    with loading(model.path, model.local is not None, "index"):
        if model.local is not None:
            file = model.local / "model_index.json"
        else:
            file = hub_file(model.path, model.revision, "model_index.json")
        index: dict[str, Any] = json.loads(file.read_text())
    return index
