"""Checks that single files fit each other and the checkpoint that gives the other parts, by their headers alone."""

import json
from pathlib import Path

from infer.checkpoint.checks import check_axes, check_channels, check_embeds
from infer.checkpoint.files import known_config
from infer.checkpoint.model import OPTIONS, Model
from infer.checkpoint.sources import file_of, rest_of
from infer.family.family import Family
from infer.family.find import of_config, of_pipeline
from infer.program.paths import is_hub_id, nowhere, refuse_file
from infer.single_file.contents import base_in, check_part
from infer.single_file.header import check_stored_kinds, read_header
from infer.single_file.transformer import place_tensors


def check_single(model: Model, file: Path) -> None:
    """Look at a single file that is model.path, and at what gives the parts that it lacks.

    Raises:
        ValueError: it is of no FLUX model, is broken, is stored in a way that is not read, or does not fit them.
    """
    refuse_file(file)
    found, header = base_in(file), read_header(file)
    own = [name for name in header.tensors if name.startswith(found.prefix) and name.endswith((".weight", ".bias"))]
    check_stored_kinds(file, header, own)  # before sizes, which those of packed weights are not
    rest = rest_of(model)
    if rest.local is not None:
        _check_rest(model, rest.local, found.family)
    elif not is_hub_id(rest.path):
        raise ValueError(nowhere("model.parts", rest.path))
    config = known_config(model, "transformer")
    check_axes(model.path, config)
    place_tensors(file, header, found, config)
    check_channels(model.path, config, known_config(model, "vae"))
    (large,) = (encoder.part for encoder in found.family.ENCODERS if encoder.large)
    check_embeds(model.path, large, found.family.embeds_width, known_config(model, large), config)


def _check_rest(model: Model, folder: Path, family: Family) -> None:
    """Raises:
    ValueError: a folder that is model.parts is no diffusers checkpoint of the family, or lacks a part.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model.parts {folder} holds no model_index.json; name a diffusers folder or a Hub id")
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} names no pipeline ({error!r}); copy the checkpoint again") from error
    other = of_pipeline(name, str(index))
    if other is not family:
        raise ValueError(
            f"model.path {model.path} holds the transformer of {family.NAME}, and model.parts {folder} is of "
            f"{other.NAME}; name a checkpoint of {family.NAME}"
        )
    absent = [part for part in family.PARTS if part != "transformer" and not (folder / part).is_dir()]
    if absent:
        raise ValueError(
            f"model.parts {folder} lacks the folders {', '.join(absent)} (of a part that is in a file too, its config "
            "is read); copy the whole checkpoint"
        )


def check_part_files(model: Model) -> None:
    """Look at the files of single parts.

    Raises:
        ValueError: one is of another part or of other sizes, or the family has no such part.
    """
    files = {part: file_of(model, part) for part in OPTIONS}
    if not any(files.values()):
        return
    family = of_config(known_config(model, "transformer"))
    for part, file in files.items():
        if file is None:
            continue
        if part not in family.FILE_MARKS:
            raise ValueError(
                f"model.{OPTIONS[part]} names a file of the {part}, which {family.NAME} has not; leave it at null"
            )
        check_part(file, family, part, known_config(model, part))


def check_written(model: Model) -> None:
    """See that a folder of the whole checkpoint can be written.

    Raises:
        ValueError: a text encoder is in a file that holds its language model alone.
    """
    for part in OPTIONS:
        file = file_of(model, part)
        if file is not None and known_config(model, part).get("text_config"):
            raise ValueError(
                f"{file} holds the language model of the {part} alone, where the folder needs its other half too; "
                "leave model.text at null for this command"
            )
