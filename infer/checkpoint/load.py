"""The parts of a FLUX checkpoint in the diffusers folder format, loaded one by one.

One at a time, so that text encoders, autoencoder and transformer need not sit in memory together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from infer.checkpoint.checks import check_axes, check_channels, check_stored, check_whole
from infer.checkpoint.family import family_of
from infer.checkpoint.files import part_folder, read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load_errors import loading
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import random_part, shape_scheduler
from infer.checkpoint.sources import file_of, rest_of
from infer.family.find import of_config
from infer.quantize.multiply import dequantize_to, keep_layout, keep_scales, multiply_plainly
from infer.quantize.precision import Precision, check_quantized

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler


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
    file = file_of(model, part)
    if file is not None:
        from infer.checkpoint.from_file import text_from_file, transformer_from_file

        with loading(str(file), True, part):
            if part == "transformer":
                loaded = transformer_from_file(model, file, precision, device, hold)
            else:
                loaded = text_from_file(model, part, file, cls, config, precision, device, hold)
        return checked(loaded, precision, device)
    from infer.quantize.quantizer import quantization_config

    stored = read_config(model, part).get("quantization_config")
    skips = linear_shapes(read_config(model, "transformer")) if precision.skip_modules else ()
    quantization = None if stored else quantization_config(precision, library, skips)
    if stored:
        check_stored(model.path, stored, precision, part)
    folder = part_folder(model, part)
    with (
        loading(rest_of(model).path, rest_of(model).local is not None, part),
        _quantizing(quantization or stored, device, hold),
    ):
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
    if precision.llm_int8:
        keep_scales(transformer)
    return transformer


def load_vae(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The autoencoder, frozen; dtype None: what the device has (infer/quantize/compute.py)."""
    import diffusers

    from infer.quantize.compute import NAMES, compute_dtype, compute_in, small_dtype

    dtype = dtype or small_dtype(device)
    if model.random:
        vae = random_part(model.path, "vae", Precision(NAMES[dtype]), device)
        compute_in(vae, compute_dtype(dtype, device))
        return _for_device(vae, device).eval().requires_grad_(False)
    file = file_of(model, "vae")
    if file is not None:
        from infer.checkpoint.from_file import autoencoder_from_file

        with loading(str(file), True, "vae"):
            vae = autoencoder_from_file(model, file, dtype)
        compute_in(vae, compute_dtype(dtype, device))
        return _for_device(vae, device).to(device).eval().requires_grad_(False)
    with loading(rest_of(model).path, rest_of(model).local is not None, "vae"):
        vae, found = getattr(diffusers, of_config(read_config(model, "vae")).AUTOENCODER).from_pretrained(
            str(part_folder(model, "vae")),
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_whole(model.path, "vae", found)
    compute_in(vae, compute_dtype(dtype, device))
    return _for_device(vae, device).to(device).eval().requires_grad_(False)


def _for_device(vae: Any, device: torch.device) -> Any:
    """On a GPU, have its norms use all of it. Where it computes in fp32 on a card without bf16, decode larger pictures
    in tiles: at 1024 it would take 8.7 GiB beside the transformer, of the 15 that such cards have; in tiles of 512,
    2.5."""
    import torch

    from infer.checkpoint.group_norm import spread_norms
    from infer.quantize.compute import small_dtype

    if device.type == "cuda":  # where it computes in the dtype that it is stored in: no forward of ours is replaced
        spread_norms(vae)
    if device.type == "cuda" and small_dtype(device) == torch.float32:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
        vae.decode_in_tiles = True
    return vae


def load_scheduler(model: Model) -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if model.random:
        return shape_scheduler(model.path)
    with loading(rest_of(model).path, rest_of(model).local is not None, "scheduler"):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(str(part_folder(model, "scheduler")))
