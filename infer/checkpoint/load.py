"""A FLUX checkpoint in the diffusers folder format, on disk or on the Hub, loaded part by part.

Parts are loaded one at a time so that text encoders, autoencoder and transformer need not sit in memory together.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.checkpoint.checks import check_axes, check_channels, check_embeds, check_stored, check_whole
from infer.checkpoint.headers import check_transformer
from infer.checkpoint.hub import hub_file, hub_part
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load_errors import loading
from infer.checkpoint.random_weights import random_part, shape_config, shape_fingerprint, shape_scheduler
from infer.family.family import Drawing, Family, LatentMap
from infer.family.find import SIZES, of_config, of_pipeline
from infer.program.paths import expand, is_hub_id, no_hub_id, no_index, not_a_model
from infer.program.remembered import Remembered
from infer.quantize.precision import (
    Precision,
    check_quantized,
    dequantize_to,
    keep_layout,
    multiply_plainly,
)

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

MEMORY = Path("runs/cache")  # what was read of local checkpoints
VAE_FILE = "diffusion_pytorch_model.safetensors"


@dataclass
class Model:
    """Where a FLUX checkpoint is."""

    path: str = "scripts/tiny/model"
    """A folder in the diffusers format, or a Hub id such as black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    weights: str = "checkpoint"
    """checkpoint, or random: the architecture of a published checkpoint at full size with random weights, to measure
    memory and speed on a machine that holds none."""

    def __post_init__(self) -> None:
        expand(self, "path")
        if not self.path:
            raise ValueError("model.path is empty; give a diffusers folder or a Hub id")
        if self.weights not in ("checkpoint", "random"):
            raise ValueError(f"model.weights is {self.weights!r}; choose checkpoint or random")
        if self.random and self.path not in SIZES:
            raise ValueError(
                f"model.weights=random knows the sizes of {', '.join(SIZES)}, not of {self.path!r}; set model=dev"
            )

    @property
    def random(self) -> bool:
        return self.weights == "random"

    @property
    def local(self) -> Path | None:
        """The folder, if the path is one."""
        folder = Path(self.path)
        return folder if folder.is_dir() else None


def check_model(model: Model) -> None:
    """Look at a local checkpoint before anything is loaded.

    Raises:
        ValueError: it is neither a Hub id nor a complete diffusers folder of a FLUX model.
    """
    folder = model.local
    if model.random:
        return
    if folder is None:
        if Path(model.path).exists():
            raise ValueError(not_a_model(Path(model.path)))
        if not is_hub_id(model.path):
            raise ValueError(
                f"model.path {model.path!r} is no folder here and no Hub id (owner/name); {no_hub_id(model.path)}"
            )
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


def load_part(
    model: Model,
    part: str,
    cls: Any,
    library: Any,
    precision: Precision,
    device: torch.device,
    hold: torch.device | None = None,
    config: Any = None,
) -> Any:
    """One part at a precision, quantized on a device and held there or on `hold`, its quantized layers checked.

    A checkpoint that was saved quantized brings its own configuration. config: the part's, where it is not to be loaded
    with its own.
    """
    hold = hold or device
    if model.random:
        loaded = random_part(model.path, part, precision, device, hold)
        return checked(loaded, precision, device)
    from infer.quantize.quantizer import quantization_config

    stored = read_config(model, part).get("quantization_config")
    skips = linear_shapes(read_config(model, "transformer")) if precision.skip_modules else ()
    quantization = None if stored else quantization_config(precision, library, skips)
    if stored:
        check_stored(model.path, stored, precision, part)
    folder = part_folder(model, part)
    with loading(model.path, model.local is not None, part), _quantizing(quantization or stored, device, hold):
        loaded, found = cls.from_pretrained(
            str(folder),
            quantization_config=quantization,
            device_map={"": hold},
            use_safetensors=True,
            output_loading_info=True,
            **{"dtype" if library.__name__ == "transformers" else "torch_dtype": precision.dtype},
            **({} if config is None else {"config": config}),
        )
    check_whole(model.path, part, found)
    if library.__name__ == "diffusers":  # which writes it into what is saved: not where this user's cache is
        loaded.register_to_config(_name_or_path=model.path)
    return checked(loaded, precision, device)


def _quantizing(wanted: Any, device: torch.device, hold: torch.device) -> AbstractContextManager[None]:
    from infer.quantize.quantizer import quantizing_on

    return quantizing_on(device, hold) if wanted else nullcontext()


def checked(loaded: Any, precision: Precision, device: torch.device) -> Any:
    import torch

    from infer.quantize.compute import compute_dtype, compute_in

    # T5 keeps these in the compute dtype itself: they overflow fp16 (transformers, _keep_in_fp32_modules)
    check_quantized(loaded, precision, tuple(getattr(loaded, "_keep_in_fp32_modules", None) or ()))
    keep_layout(loaded)
    dtype = compute_dtype(precision.dtype, device)
    if dtype != precision.dtype:
        compute_in(loaded, dtype)
    elif dtype == torch.float16:
        dequantize_to(loaded, dtype)
    return loaded.eval().requires_grad_(False)


def load_transformer(model: Model, precision: Precision, device: torch.device, hold: torch.device | None = None) -> Any:
    """The transformer, frozen, in eval mode, on `device`, or on `hold` (the CPU, for `infer/fast/offload.py`)."""
    import diffusers
    import torch

    from infer.fast.half import compute_in_half
    from infer.quantize.compute import compute_dtype, stored_on

    precision = stored_on(precision, device)
    cls = getattr(diffusers, family_of(model).TRANSFORMER)
    transformer = load_part(model, "transformer", cls, diffusers, precision, device, hold)
    config = read_config(model, "transformer")
    check_axes(model.path, config)
    if not model.random:
        check_channels(model.path, config, read_config(model, "vae"))
    if compute_dtype(precision.dtype, device) == torch.float16:
        compute_in_half(transformer, precision.llm_int8)
    elif not precision.llm_int8:
        multiply_plainly(transformer)
    return transformer


def load_vae(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The autoencoder, frozen; dtype None: what the device has (infer/quantize/compute.py)."""
    import diffusers

    from infer.quantize.compute import NAMES, compute_dtype, compute_in, small_dtype

    dtype = dtype or small_dtype(device)
    if model.random:
        vae = random_part(model.path, "vae", Precision(NAMES[dtype]), device)
        compute_in(vae, compute_dtype(dtype, device))
        return _tiled(vae, device).eval().requires_grad_(False)
    with loading(model.path, model.local is not None, "vae"):
        vae, found = getattr(diffusers, of_config(read_config(model, "vae")).AUTOENCODER).from_pretrained(
            str(part_folder(model, "vae")),
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_whole(model.path, "vae", found)
    compute_in(vae, compute_dtype(dtype, device))
    return _tiled(vae, device).to(device).eval().requires_grad_(False)


def _tiled(vae: Any, device: torch.device) -> Any:
    """Where it computes in fp32 on a card without bf16, decode larger pictures in tiles: at 1024 it would take 8.7 GiB
    beside the transformer, of the 15 that such cards have; in tiles of 512, 2.5."""
    import torch

    from infer.quantize.compute import small_dtype

    if device.type == "cuda" and small_dtype(device) == torch.float32:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
        vae.decode_in_tiles = True
    return vae


def load_scheduler(model: Model) -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if model.random:
        return shape_scheduler(model.path)
    with loading(model.path, model.local is not None, "scheduler"):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(str(part_folder(model, "scheduler")))


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
    """How the autoencoder's latents become those that the transformer expects; reads single tensors of it at most.

    Raises:
        ValueError: its config or its weights do not say.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    config = read_config(model, "vae")

    def tensor(name: str) -> torch.Tensor:
        if model.random:
            size = (config["latent_channels"] * 4,)
            return torch.full(size, 1.0 if name.endswith("var") else 0.0)
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


def family_of(model: Model) -> Family:
    """The family of a checkpoint, by its transformer's class.

    Raises:
        ValueError: no family has it.
    """
    return of_config(_transformer_config(model))


def _transformer_config(model: Model) -> dict[str, Any]:
    """The transformer's config.json. Of a published checkpoint that is not here, what is known of it: no network."""
    if model.local is None and model.path in SIZES:
        return SIZES[model.path]["transformer"]
    return read_config(model, "transformer")


def _family_index(model: Model) -> dict[str, Any]:
    """What a family is told of model_index.json: {} where it can do without and the Hub would have to be asked."""
    if model.local is None and model.path in SIZES:
        return SIZES[model.path]["index"]
    return pipeline_index(model) if model.local is not None or family_of(model).INDEXED else {}


def own_drawing(model: Model) -> Drawing:
    """Steps and guidance that the checkpoint is drawn with if nothing else is said."""
    return family_of(model).drawing(model.path, _family_index(model), _transformer_config(model))


def unguided(model: Model) -> str | None:
    """Why guidance has no effect on what the checkpoint draws; None if it has."""
    return family_of(model).unguided(_family_index(model), _transformer_config(model))


def distilled_from(model: Model) -> str | None:
    """The checkpoint to train on in place of a few-step distilled one; None if this one is none."""
    return family_of(model).distilled_from(model.path, _family_index(model), _transformer_config(model))


def distilled_to(model: Model) -> str | None:
    """The few-step checkpoint that adapters of this one are drawn on too; None if there is none."""
    return family_of(model).distilled_to(_family_index(model), _transformer_config(model))


def takes_references(model: Model) -> bool:
    """Whether the checkpoint was trained with reference pictures."""
    known = model.local is None and model.path in SIZES
    index = SIZES[model.path]["index"] if known else pipeline_index(model)
    return family_of(model).takes_references(index)


def pipeline_of(model: Model) -> str:
    """diffusers' class of the pipeline; the family's first one where the Hub would have to be asked."""
    return str(_family_index(model).get("_class_name", next(iter(family_of(model).PIPELINES))))


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


def fingerprint(model: Model, part: str) -> str:
    """A hash of a part's weights and config: what a cache or an adapter made with it depends on.

    Weights downloaded from the Hub are stored under their own SHA-256, which saves reading them; what was read of a
    local folder is remembered (infer/program/remembered.py).
    """
    if model.random:
        return shape_fingerprint(model.path, part)
    folder = part_folder(model, part)
    digest, remembered = hashlib.sha256(), Remembered(MEMORY)
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".json", ".model", ".txt", ".jinja"):
            continue
        blob = file.resolve().name
        digest.update(file.name.encode())
        if len(blob) == 64 and file.is_symlink():
            digest.update(blob.encode())
            continue
        digest.update(remembered.sha256(file))
    remembered.save()
    return digest.hexdigest()


def guided_by_two_calls(model: Model) -> bool:
    """Whether guidance takes two calls of the transformer, the second one with the empty prompt."""
    return family_of(model).two_calls(_family_index(model), _transformer_config(model))
