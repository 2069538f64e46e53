"""A FLUX.1 checkpoint in the diffusers folder format, on disk or on the Hub, loaded part by part.

Parts are loaded one at a time so that T5, the autoencoder and the transformer need not sit in memory together.
The bundled model and FLUX.1-dev differ by their path alone.
"""

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from infer.absent import loading
from infer.quantize import (
    Precision,
    check_device,
    check_quantized,
    keep_layout,
    linear_layers,
    multiply_plainly,
    quantization_config,
)
from infer.quantizing import quantizing_on
from infer.shapes import SHAPES, random_part, shape_config, shape_fingerprint, shape_scheduler, shape_tokenizer
from infer.whole import check_axes, check_stored, check_whole, check_words

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


@dataclass
class Model:
    """Where a FLUX.1 checkpoint is."""

    path: str = "scripts/tiny/model"
    """A folder in the diffusers format, or a Hub id such as black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    weights: str = "checkpoint"
    """checkpoint, or random: the architecture of FLUX.1-dev or schnell at full size with random weights, to measure
    memory and speed on a machine that holds no checkpoint."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("model.path is empty; give a diffusers folder or a Hub id")
        if self.weights not in ("checkpoint", "random"):
            raise ValueError(f"model.weights is {self.weights!r}; choose checkpoint or random")
        if self.random and self.path not in SHAPES:
            raise ValueError(
                f"model.weights=random knows the sizes of {', '.join(SHAPES)}, not of {self.path!r}; set model=dev"
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
        ValueError: it is neither a Hub id nor a complete diffusers folder of a FLUX.1 model.
    """
    folder = model.local
    if model.random:
        return
    if folder is None:
        if Path(model.path).is_absolute() or model.path.startswith(".") or model.path.count("/") != 1:
            raise ValueError(
                f"model.path {model.path!r} is no folder here and no Hub id (owner/name); check the spelling"
            )
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} holds no model_index.json, so it is no diffusers checkpoint; a single-file checkpoint "
            "is turned into one with FluxPipeline.from_single_file(...).save_pretrained(...)"
        )
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} names no pipeline ({error!r}); copy the checkpoint again") from error
    if name != "FluxPipeline":
        raise ValueError(f"{index} is of a {name}, not a FluxPipeline; this toolkit reads FLUX.1 checkpoints")
    absent = [part for part in PARTS if not (folder / part).is_dir()]
    if absent:
        raise ValueError(f"{folder} lacks the folders {', '.join(absent)}; copy the whole checkpoint")


def read_config(model: Model, part: str) -> dict[str, Any]:
    """A part's config.json."""
    if model.random:
        return shape_config(model.path, part)
    with loading(model.path, model.local is not None, part):
        config: dict[str, Any] = json.loads(_config_file(model, part).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"config.json of the {part} of {model.path} is no JSON object; copy the checkpoint again")
    return config


def empty_transformer(model: Model) -> FluxTransformer2DModel:
    """The transformer without its weights: names and shapes."""
    with init_empty_weights():
        return FluxTransformer2DModel.from_config(read_config(model, "transformer"))


def config_number(model: Model, part: str, name: str) -> float:
    """A number of a part's config.json.

    Raises:
        ValueError: there is none of that name.
    """
    value = read_config(model, part).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"config.json of the {part} of {model.path} has {name}={value!r} where a number belongs; copy the "
            "checkpoint again"
        )
    return value


def _config_file(model: Model, part: str) -> Path:
    if model.local is not None:
        return model.local / part / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model.path, f"{part}/config.json", revision=model.revision))


def _load(
    model: Model,
    part: str,
    cls: Any,
    library: Any,
    precision: Precision,
    device: torch.device,
    hold: torch.device | None = None,
) -> Any:
    """One part at a precision, quantized on a device and held there or on `hold`, its quantized layers checked.

    A checkpoint that was saved quantized brings its own configuration.
    """
    hold = hold or device
    if model.random:
        loaded = random_part(model.path, part, precision, device, hold)
        return _checked(loaded, precision)
    stored = read_config(model, part).get("quantization_config")
    skips = linear_layers(empty_transformer(model)) if precision.skip_modules else ()
    config = None if stored else quantization_config(precision, library, skips)
    if stored:
        check_stored(model.path, stored, precision, part)
    with loading(model.path, model.local is not None, part), _quantizing(config or stored, device, hold):
        loaded, found = cls.from_pretrained(
            model.path,
            subfolder=part,
            revision=model.revision,
            quantization_config=config,
            device_map={"": hold},
            use_safetensors=True,
            output_loading_info=True,
            **{"dtype" if library.__name__ == "transformers" else "torch_dtype": precision.dtype},
        )
    check_whole(model.path, part, found)
    return _checked(loaded, precision)


def _quantizing(wanted: Any, device: torch.device, hold: torch.device) -> AbstractContextManager[None]:
    return quantizing_on(device, hold) if wanted else nullcontext()


def _checked(loaded: Any, precision: Precision) -> Any:
    # T5 keeps these in the compute dtype itself: they overflow fp16 (transformers, _keep_in_fp32_modules)
    check_quantized(loaded, precision, tuple(getattr(loaded, "_keep_in_fp32_modules", None) or ()))
    keep_layout(loaded)
    return loaded.eval().requires_grad_(False)


def load_transformer(
    model: Model, precision: Precision, device: torch.device, hold: torch.device | None = None
) -> FluxTransformer2DModel:
    """The transformer, frozen, in eval mode, on `device`, or on `hold` (the CPU, for `infer/stream.py`)."""
    import diffusers

    check_device(precision, device)
    transformer = _load(model, "transformer", FluxTransformer2DModel, diffusers, precision, device, hold)
    check_axes(model.path, transformer)
    if not precision.llm_int8:
        multiply_plainly(transformer)
    return transformer


def load_text_parts(model: Model, precision: Precision, device: torch.device) -> dict[str, Any]:
    """Both text encoders with their tokenizers, by their names in a FluxPipeline; T5 at the precision's `t5`."""
    import transformers

    t5_precision = precision.for_t5()
    parts = {
        "text_encoder": _load(
            model, "text_encoder", transformers.CLIPTextModel, transformers, Precision("bf16"), device
        ),
        "text_encoder_2": _load(
            model, "text_encoder_2", transformers.T5EncoderModel, transformers, t5_precision, device
        ),
    }
    for name in ("tokenizer", "tokenizer_2"):
        if model.random:
            parts[name] = shape_tokenizer(model.path, name)
            continue
        with loading(model.path, model.local is not None, name):
            parts[name] = transformers.AutoTokenizer.from_pretrained(
                model.path, subfolder=name, revision=model.revision, trust_remote_code=False
            )
        check_words(model.path, name, parts[name], parts[name.replace("tokenizer", "text_encoder")])
    return parts


def load_vae(model: Model, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> AutoencoderKL:
    """The autoencoder, frozen."""
    if model.random:
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        return random_part(model.path, "vae", Precision(kind), device).eval().requires_grad_(False)
    with loading(model.path, model.local is not None, "vae"):
        vae, found = AutoencoderKL.from_pretrained(
            model.path,
            subfolder="vae",
            revision=model.revision,
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_whole(model.path, "vae", found)
    return vae.to(device).eval().requires_grad_(False)


def load_scheduler(model: Model) -> FlowMatchEulerDiscreteScheduler:
    if model.random:
        return shape_scheduler(model.path)
    with loading(model.path, model.local is not None, "scheduler"):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(
            model.path, subfolder="scheduler", revision=model.revision
        )


def own_size(model: Model) -> int:
    """Pixels a side that the checkpoint was made for: what its autoencoder's config says (1024 for FLUX.1-dev)."""
    return int(config_number(model, "vae", "sample_size"))


def part_folder(model: Model, part: str) -> Path:
    """The folder of a part, downloaded if the model is on the Hub and not here yet."""
    if model.local is not None:
        return model.local / part
    from huggingface_hub import snapshot_download

    with loading(model.path, model.local is not None, part):
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=[f"{part}/*"])) / part


def fingerprint(model: Model, part: str) -> str:
    """A hash of a part's weights and config: what a cache or an adapter made with it depends on.

    Weights downloaded from the Hub are stored under their own SHA-256, which saves reading them.
    """
    if model.random:
        return shape_fingerprint(model.path, part)
    folder = part_folder(model, part)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".json", ".model", ".txt"):
            continue
        blob = file.resolve().name
        digest.update(file.name.encode())
        if len(blob) == 64 and file.is_symlink():
            digest.update(blob.encode())
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
