"""What a checkpoint's files hold, by their configs and headers alone: seen in milliseconds, before anything loads."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from infer.checkpoint.checks import check_axes, check_channels, check_embeds, check_whole
from infer.checkpoint.file_checks import check_part_files, check_single
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes, norm_sizes
from infer.checkpoint.model import Model
from infer.family.family import Linear
from infer.family.find import of_config, of_pipeline
from infer.program.paths import POINTER, is_hub_id, kind_of_file, no_index, nowhere

SINGLE = "diffusion_pytorch_model.safetensors"


def check_model(model: Model) -> None:
    """Look at a local checkpoint before anything is loaded.

    Raises:
        ValueError: it is neither a Hub id, a complete diffusers folder nor a single file of a FLUX model, or a single
            file does not fit the other parts.
    """
    if model.random:
        return
    if model.file is not None:
        check_single(model, model.file)
    else:
        _check_folder(model)
    check_part_files(model)


def _check_folder(model: Model) -> None:
    folder = model.local
    if folder is None:
        if not is_hub_id(model.path):
            raise ValueError(nowhere("model.path", model.path))
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(no_index(folder))
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} names no pipeline ({error!r}); copy the checkpoint again") from error
    family = of_pipeline(name, str(index))
    absent = [part for part in family.PARTS if not (folder / part).is_dir()]
    if absent:
        raise ValueError(f"{folder} lacks the folders {', '.join(absent)}; copy the whole checkpoint")
    check_channels(model.path, read_config(model, "transformer"), read_config(model, "vae"))
    (large,) = (encoder.part for encoder in family.ENCODERS if encoder.large)
    check_embeds(model.path, large, family.embeds_width, read_config(model, large), read_config(model, "transformer"))
    check_transformer(model.path, folder / "transformer", read_config(model, "transformer"))


def shards_of(folder: Path) -> list[Path]:
    """A transformer's files of weights.

    Raises:
        ValueError: its index cannot be read, or there are none.
    """
    index = folder / f"{SINGLE}.index.json"
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{folder} holds neither {SINGLE} nor its index; copy the whole checkpoint")
        return [folder / SINGLE]
    try:
        return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} does not say which file holds what ({error!r}); copy the checkpoint again"
        ) from error


def stored_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The size of every tensor in a transformer's files, by its name.

    Raises:
        ValueError: a file is absent, cut off or none of safetensors.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in shards_of(folder):
        try:
            with safe_open(file, framework="numpy") as reader:
                found |= {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            what = POINTER if kind_of_file(file) == "pointer" else f"{error}; copy the checkpoint again"
            raise ValueError(f"cannot load the transformer: {file}: {what}") from error
    return found


def check_transformer(path: str, folder: Path, config: dict[str, Any]) -> None:
    """Compare a transformer's files with its config.json.

    path: the model's, for messages.

    Raises:
        ValueError: the config lacks a number, the files lack a tensor, or one has another size.
    """
    check_axes(path, config)
    family = of_config(config)
    try:
        layers: dict[str, Linear] = linear_shapes(config)
        norms = norm_sizes(config)
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"config.json of the transformer of {path} is not that of a {family.NAME} transformer ({error!r}); copy "
            "it again"
        ) from error
    stored = stored_sizes(folder)
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in norms.items()}
    if family.BIAS:
        wanted |= {f"{name}.bias": (layer.rows,) for name, layer in layers.items()}
    weights = {f"{name}.weight": tuple(layer) for name, layer in layers.items()}
    missing = (wanted.keys() | weights.keys()) - stored.keys()
    check_whole(path, "transformer", {"missing_keys": missing})
    if "quantization_config" not in config:  # packed weights have sizes of their own
        wanted |= weights
    for name, size in wanted.items():
        if stored[name] != size:
            raise ValueError(
                f"cannot load the transformer of {path}: {name} is of size {stored[name]}, where its config.json asks "
                f"for {size}; copy the checkpoint again"
            )
