"""sampling.model: a second checkpoint that an adapter is drawn on too, as one of klein's base on its distilled one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from infer.adapter.lora import FROM_ERROR
from infer.adapter.read import find_adapter, read_notes
from infer.checkpoint.family import distilled_to, family_of
from infer.checkpoint.files import read_config
from infer.checkpoint.headers import check_model
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.checkpoint.shipped import DISTILLED, shipped_models, shipped_name


def second_model(model: Model, name: str) -> Model:
    """The checkpoint that sampling.model names: `distilled`, a name of configs/model, a folder, or a Hub id.

    Raises:
        ValueError: it is no checkpoint, or none that adapters of `model` fit.
    """
    path = shipped_models().get(name, name)
    if name == DISTILLED:
        known = distilled_to(model)
        if known is None:
            raise ValueError(
                f"sampling.model is {DISTILLED}, and no checkpoint is known that is distilled from {model.path}; give "
                "its folder or its Hub id"
            )
        path = known
    try:
        second = Model(path, weights=model.weights)
        check_model(second)
        if not second.random and second.local is None and second.file is None and not Path(path).parts[1:]:
            raise ValueError(f"{path!r} is no folder")
    except ValueError as error:
        raise ValueError(
            f"sampling.model is {name!r}: {error}; give {DISTILLED}, a name that model=... takes, a folder or a Hub id"
        ) from error
    if second.path == model.path or (second.local and model.local and second.local.samefile(model.local)):
        raise ValueError(f"sampling.model is {name!r}, which is the model itself; leave it at null")
    _check_alike(model, second)
    return second


def _check_alike(model: Model, second: Model) -> None:
    """Raises:
    ValueError: adapters of the one do not fit the other, or it reads other texts.
    """
    mend = "choose one of the same family and size, or null"
    if family_of(model).NAME != family_of(second).NAME:
        raise ValueError(
            f"sampling.model {second.path} is of {family_of(second).NAME}, and {model.path} of "
            f"{family_of(model).NAME}; {mend}"
        )
    here, there = (
        {name: layer for name, layer in linear_shapes(read_config(one, "transformer")).items() if "blocks." in name}
        for one in (model, second)
    )
    if here != there:
        raise ValueError(
            f"sampling.model {second.path} has blocks of other sizes than {model.path}, which adapters of the one do "
            f"not fit; {mend}"
        )
    for encoder in family_of(model).ENCODERS:
        sizes = ("model_type", "hidden_size", "num_hidden_layers", "d_model", "num_layers", "vocab_size")
        a, b = (read_config(one, encoder.part) for one in (model, second))
        a, b = ({key: config.get("text_config", config).get(key) for key in sizes} for config in (a, b))
        if a != b:
            raise ValueError(
                f"sampling.model {second.path} reads another {encoder.part} than {model.path}, whose embeddings are "
                f"all that is kept; {mend}"
            )


def check_same_start(paths: Collection[str], recovery: bool) -> None:
    """See that adapters are such as another checkpoint can have. paths: their files; recovery: whether one of them
    gives back what quantization took.

    Raises:
        ValueError: they belong to the rounding error of one checkpoint.
    """
    mend = "set sampling.model=null"
    if recovery:
        raise ValueError(
            f"a recovery adapter makes up for the rounding of one checkpoint, and sampling.model draws on two; {mend}"
        )
    for path in paths:
        init = read_notes(find_adapter(path)).get("adapter", {}).get("init")
        if init in FROM_ERROR:
            raise ValueError(
                f"{path} starts from the rounding error of its checkpoint (adapter.init={init}), and sampling.model "
                f"draws on another one; {mend}"
            )


def short_name(model: Model) -> str:
    """What a picture's column calls a checkpoint."""
    return shipped_name(model) or Path(model.path).name
