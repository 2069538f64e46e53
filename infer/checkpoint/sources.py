"""Where each part of a checkpoint comes from: its folder or the Hub, or a single file (infer/single_file)."""

from __future__ import annotations

from pathlib import Path

from infer.checkpoint.model import OPTIONS, Model
from infer.single_file.contents import base_in, part_prefix, published
from infer.single_file.header import read_header


def rest_of(model: Model) -> Model:
    """The folder or Hub id of whatever no single file gives: configs and tokenizers, and parts that are in none.

    Raises:
        ValueError: model.parts is not given, and no published model has the file's sizes.
    """
    if model.file is None or model.random:
        return Model(model.path, revision=model.revision, weights=model.weights)
    path = model.parts or published(model.file)
    if path is None:
        raise ValueError(
            f"model.parts is null, and no published model has the sizes of {model.path}; name the diffusers folder or "
            "the Hub id whose text encoders, tokenizers and autoencoder belong to it"
        )
    return Model(path, revision=model.revision)


def file_of(model: Model, part: str) -> Path | None:
    """The single file with the weights of a part; None if they are in the folder or on the Hub."""
    if part in OPTIONS and (given := getattr(model, OPTIONS[part])) is not None:
        return Path(given)
    if model.file is None or model.random:
        return None
    if part == "transformer":
        return model.file
    family, header = base_in(model.file).family, read_header(model.file)
    inside = part in family.FILE_MARKS and part_prefix(header, family, part) is not None
    return model.file if inside else None
