"""Which parts of a checkpoint a single file holds, and which published model the others are of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.family.family import Family
from infer.family.find import FAMILIES
from infer.single_file.header import Header, check_stored_kinds, read_header
from infer.single_file.transformer import Found, file_config, find_transformer, other_model

OPTIONS = {"text_encoder": "model.text", "text_encoder_2": "model.text_2", "vae": "model.vae"}
"""The settings that name a file of a part, for messages."""


def part_prefix(header: Header, family: Family, part: str) -> str | None:
    """What stands before a part's own names in a file; None if the file does not hold the part.

    part: a text encoder or the autoencoder. Of a text encoder in a GGUF, whose names are llama.cpp's, it is empty.
    """
    if header.architecture is not None:
        return "" if family.GGUF_TEXT.get(header.architecture) == part else None
    mark = family.FILE_MARKS[part]
    found = (name for name in header.tensors if name == mark or name.endswith(f".{mark}"))
    return next((name.removesuffix(mark) for name in found), None)


def parts_in(header: Header) -> list[tuple[Family, str]]:
    """The parts beside a transformer that a file holds, each with every family that has it."""
    return [(family, part) for family in FAMILIES for part in OPTIONS if part in family.FILE_MARKS
            and part_prefix(header, family, part) is not None]  # fmt: skip


def base_in(file: Path) -> Found:
    """The transformer in a file that was given as model.path.

    Raises:
        ValueError: it holds none that is read here.
    """
    header = read_header(file)
    found = find_transformer(header)
    if found is not None:
        return found
    other = other_model(header)
    if other is not None:
        raise ValueError(f"model.path {file} is of {other}; this toolkit reads {_families()}")
    held = list(dict.fromkeys(OPTIONS[part] for _, part in parts_in(header)))
    if held:
        raise ValueError(
            f"model.path {file} holds no transformer; give it as {' or '.join(held)}, and the transformer's file, a "
            "diffusers folder or a Hub id as model.path"
        )
    packed = next((name for name, one in header.tensors.items() if one.kind == "U8"), None)
    if packed is not None:
        check_stored_kinds(file, header, [packed])
    if not header.tensors:
        raise ValueError(f"model.path {file} holds no tensors; download it again")
    raise ValueError(
        f"model.path {file} holds no transformer of {_families()} (its tensors are "
        f"{', '.join(list(header.tensors)[:3])}, ...); give a file with Black Forest Labs' or diffusers' names"
    )


def _families() -> str:
    return " and ".join(family.NAME for family in FAMILIES)


def published(file: Path) -> str | None:
    """The Hub id of the published model whose sizes a file's transformer has; None if there is none.

    Of several the one whose name is most like the file's: klein and its base differ in nothing else.

    Raises:
        ValueError: the file lacks a tensor that says a size.
    """
    header, found = read_header(file), base_in(file)
    words = set(_words(file.stem))
    best: tuple[float, str] | None = None
    for path, sizes in found.family.SIZES.items():
        given = sizes["transformer"]
        shapes = found.family.linear_shapes
        try:
            config = file_config(header, found, given)
        except ValueError as error:
            raise ValueError(f"model.path {file}: {error}") from error
        if shapes(config) != shapes(given):
            continue
        own = set(_words(path.rpartition("/")[2]))
        likeness = len(own & words) - len(own - words)
        if best is None or likeness > best[0]:
            best = likeness, path
    return None if best is None else best[1]


def _words(name: str) -> list[str]:
    """Words and numbers: FLUX.2-klein-base-4B and flux2_klein_base_4b_fp8 have flux, 2, klein, base, 4 and b."""
    return re.findall(r"[a-z]+|\d+", name.lower())


def check_part(file: Path, family: Family, part: str, config: Mapping[str, Any]) -> str:
    """See that a file holds a part that fits its config.json; returns the prefix of its names.

    Raises:
        ValueError: it holds another part, or one of other sizes, or is stored in a way that is not read.
    """
    header, option = read_header(file), OPTIONS[part]
    prefix = part_prefix(header, family, part)
    if prefix is None:
        held = [(each, other) for each, other in parts_in(header) if (each, other) != (family, part)]
        raise ValueError(f"{option} {file} is no {part} of {family.NAME}; {_mend(held, family, header)}")
    if header.architecture is None:
        mark = prefix + family.FILE_MARKS[part]
        check_stored_kinds(file, header, [mark])
        shape, text = header.tensors[mark].shape, config.get("text_config", config)
        if len(shape) < 2:
            raise ValueError(f"{option} {file} is damaged: {mark} is of size {shape}; download it again")
        found = shape[1]
        asked = config.get("latent_channels") if part == "vae" else text.get("hidden_size", text.get("d_model", found))
        if found != asked:
            raise ValueError(
                f"{option} {file} is of another size: {mark} is of size {shape}, where the config "
                f"of the {part} asks for {asked} in place of {found}; give the file that belongs to the model"
            )
    return prefix


def _mend(held: list[tuple[Family, str]], family: Family, header: Header) -> str:
    own = [OPTIONS[part] for each, part in held if each is family]
    if own:
        return f"give it as {' or '.join(own)}"
    if held:
        each, part = held[0]
        return f"it holds the {part} of {each.NAME}: give the file that belongs to the model"
    if find_transformer(header) is not None:
        return "it holds a transformer: give it as model.path"
    if header.architecture is not None:
        read = sorted({name for each in FAMILIES for name in each.GGUF_TEXT})
        return (
            f"it is a GGUF of {header.architecture}, where {' and '.join(read)} are read: give the part as safetensors"
        )
    return "give a file with the names of transformers, ComfyUI or Black Forest Labs"
