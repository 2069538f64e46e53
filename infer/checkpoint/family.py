"""What a checkpoint's family says of it: steps, guidance, related checkpoints, size, the map of its latents.

The families (infer/family) take configs. Here the checkpoint's own are read for them, from the known sizes of published
checkpoints where the network would be asked.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from infer.checkpoint.files import part_folder, pipeline_index, read_config
from infer.checkpoint.model import Model
from infer.checkpoint.shipped import shipped_base, shipped_distilled
from infer.checkpoint.sources import file_of, rest_of
from infer.family.family import Drawing, Family, LatentMap
from infer.family.find import SIZES, of_config

if TYPE_CHECKING:
    import torch

VAE_FILE = "diffusion_pytorch_model.safetensors"


def family_of(model: Model) -> Family:
    """The family of a checkpoint, by its transformer's class.

    Raises:
        ValueError: no family has it.
    """
    return of_config(_transformer_config(model))


def _transformer_config(model: Model) -> dict[str, Any]:
    """The transformer's config.json. Of a published checkpoint that is not here, what is known of it: no network."""
    if model.file is None and model.local is None and model.path in SIZES:
        return SIZES[model.path]["transformer"]
    return read_config(model, "transformer")


def _family_index(model: Model) -> dict[str, Any]:
    """What a family is told of model_index.json: {} where it can do without and the Hub would have to be asked."""
    rest = rest_of(model)
    if rest.local is None and rest.path in SIZES:
        return SIZES[rest.path]["index"]
    return pipeline_index(rest) if rest.local is not None or family_of(model).INDEXED else {}


def own_drawing(model: Model) -> Drawing:
    """Steps and guidance that the checkpoint is drawn with if nothing else is said."""
    return family_of(model).drawing(rest_of(model).path, _family_index(model), _transformer_config(model))


def unguided(model: Model) -> str | None:
    """Why guidance has no effect on what the checkpoint draws; None if it has."""
    return family_of(model).unguided(_family_index(model), _transformer_config(model))


def guided_by_two_calls(model: Model) -> bool:
    """Whether guidance takes two calls of the transformer, the second one with the empty prompt."""
    return family_of(model).two_calls(_family_index(model), _transformer_config(model))


def distilled_from(model: Model) -> str | None:
    """The checkpoint to train on in place of a few-step distilled one; None if this one is none."""
    base = family_of(model).distilled_from(rest_of(model).path, _family_index(model), _transformer_config(model))
    return base and (shipped_base(model) or base)


def distilled_to(model: Model) -> str | None:
    """The few-step checkpoint that adapters of this one are drawn on too; None if there is none."""
    return shipped_distilled(model) or family_of(model).distilled_to(_family_index(model), _transformer_config(model))


def takes_references(model: Model) -> bool:
    """Whether the checkpoint was trained with reference pictures."""
    rest = rest_of(model)
    known = rest.local is None and rest.path in SIZES  # no network
    index = SIZES[rest.path]["index"] if known else pipeline_index(rest)
    return family_of(model).takes_references(index)


def pipeline_of(model: Model) -> str:
    """diffusers' class of the pipeline; the family's first one where the Hub would have to be asked."""
    return str(_family_index(model).get("_class_name", next(iter(family_of(model).PIPELINES))))


def own_size(model: Model) -> int:
    """Pixels a side that the checkpoint was made for: what its autoencoder's config says (1024 for FLUX.1-dev).

    Raises:
        ValueError: it says none.
    """
    value = read_config(model, "vae").get("sample_size")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(_no_number(model, f"has sample_size={value!r} where a number belongs"))
    return int(value)


def latent_map(model: Model) -> LatentMap:
    """How the autoencoder's latents become those that the transformer expects. Of a folder single tensors are read, a
    single file once.

    Raises:
        ValueError: its config or its weights do not say.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from infer.single_file.weights import autoencoder_weights

    config, file = read_config(model, "vae"), file_of(model, "vae")

    @cache
    def weights() -> dict[str, torch.Tensor]:
        """Of a single file, whose tensors have other names and forms: all of them, at once."""
        assert file is not None
        return autoencoder_weights(file, of_config(config), config)

    def tensor(name: str) -> torch.Tensor:
        if model.random:
            size = (config["latent_channels"] * 4,)
            return torch.full(size, 1.0 if name.endswith("var") else 0.0)
        if file is not None:
            return weights()[name]
        with safe_open(part_folder(model, "vae") / VAE_FILE, framework="pt") as reader:
            found: torch.Tensor = reader.get_tensor(name)
            return found

    try:
        return of_config(config).latent_map(config, tensor)
    except ValueError as error:
        raise ValueError(_no_number(model, str(error))) from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot load the vae of {model.path}: {error}; copy the checkpoint again") from error


def _no_number(model: Model, said: str) -> str:
    return f"config.json of the vae of {model.path} {said}; copy the checkpoint again"
