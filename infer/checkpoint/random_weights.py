"""An architecture at full size with random weights: true memory and true speed, no licence and no download.

Each part is made on the meta device and filled there layer by layer, so that a quantized model never needs its bf16
weights in memory. The sizes are those of the published checkpoints (infer/family/). Pictures drawn with it are noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from infer.family.find import SIZES, of_config
from infer.quantize.precision import Precision

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from torch import Tensor, nn

CHAT = (  # of a language model's tokenizer: the words alone
    "{% for message in messages %}{% set said = message['content'] %}"
    "{{ said if said is string else said[0]['text'] }}{% endfor %}{% if enable_thinking is defined %}{% endif %}"
)
BUFFERS = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}  # of a batch norm


def shape_config(path: str, part: str) -> dict[str, Any]:
    """A part's config.

    Raises:
        ValueError: the sizes of this model are not known here.
    """
    if path not in SIZES:
        raise ValueError(f"model.weights=random knows the sizes of {', '.join(SIZES)}, not of {path!r}; choose one")
    return SIZES[path][part]


def _arguments(path: str, part: str) -> dict[str, Any]:
    """A part's config without what it says of its class."""
    return {name: value for name, value in shape_config(path, part).items() if not name.startswith("_")}


def shape_fingerprint(path: str, part: str) -> str:
    """In place of a hash of the weights: they follow from the config."""
    config = {} if part.startswith("tokenizer") else _arguments(path, part)
    return hashlib.sha256(f"random {part} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()


def random_part(
    path: str, part: str, precision: Precision, device: torch.device, hold: torch.device | None = None
) -> Any:
    """A part with random weights, made and quantized on a device layer by layer and held there or on `hold`.

    The weights depend on the part and the device's kind alone.
    """
    import diffusers
    import torch
    from torch import nn

    family = of_config(shape_config(path, "transformer"))
    with torch.device("meta"):
        if part in ("transformer", "vae"):
            name = family.TRANSFORMER if part == "transformer" else family.AUTOENCODER
            model: Any = getattr(diffusers, name)(**_arguments(path, part))
        else:
            cls, config = family.text_class(part, shape_config(path, part), whole=False)
            model = family.text_body(cls(config or cls.config_class(**shape_config(path, part))))
    model = nn.Module.to(model, precision.dtype)  # diffusers' own warns of modules that are not there
    _replace_layers(model, part, precision, device, hold or device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, precision, device, hold or device, generator)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, f"{left[0]} was not filled"
    return model


def _replace_layers(
    model: nn.Module, part: str, precision: Precision, device: torch.device, hold: torch.device
) -> None:
    """Linear layers -> bitsandbytes' own, by the libraries' own replacement."""
    if not precision.quantized:
        return
    from infer.quantize.quantizer import LayerQuantizer, quantization_config

    if part == "transformer":
        import diffusers

        quantizer = LayerQuantizer(quantization_config(precision, diffusers), device, hold, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=[])
        model.hf_quantizer = quantizer
        return
    import transformers
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    replace_with_bnb_linear(model, kept, quantization_config(precision, transformers))


def _fill(
    module: nn.Module, precision: Precision, device: torch.device, hold: torch.device, generator: torch.Generator
) -> None:
    """Random values for a module's own meta tensors: layers keep the variance of what they read, norms are ones."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    from infer.quantize.quantizer import held

    for name, old in list(module.named_parameters(recurse=False)):
        if not old.is_meta:
            continue
        if name == "bias" or old.ndim == 1:
            flat = torch.zeros if name == "bias" else torch.ones
            module.register_parameter(name, nn.Parameter(flat(old.shape, dtype=precision.dtype, device=hold), False))
            continue
        fan_in = old.numel() // old.shape[0] if not isinstance(module, nn.Embedding) else 1
        if isinstance(module, nn.Linear):
            fan_in = module.in_features
        value = torch.randn(_full_shape(module, old), dtype=precision.dtype, device=device, generator=generator)
        value /= math.sqrt(fan_in)
        if isinstance(old, bnb.nn.Params4bit):
            new: nn.Parameter = bnb.nn.Params4bit(
                value,
                requires_grad=False,
                blocksize=old.blocksize,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=module,
            ).to(device)
        elif isinstance(old, bnb.nn.Int8Params):
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(value.half())
            new = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        else:
            new = nn.Parameter(value.to(hold), False)
        module.register_parameter(name, held(new, hold))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if not buffer.is_meta:
            continue
        if name == "position_ids":
            module.register_buffer(name, torch.arange(buffer.shape[-1], device=hold)[None], persistent=False)
        elif name in BUFFERS:
            module.register_buffer(name, torch.full(buffer.shape, BUFFERS[name], dtype=buffer.dtype, device=hold))
        else:
            _fill_rotary(module, name, hold)


def _fill_rotary(module: nn.Module, name: str, hold: torch.device) -> None:
    """The frequencies of a language model's rotary embedding, which follow from its config."""
    assert name in ("inv_freq", "original_inv_freq"), f"{name} is no buffer that is known here"
    made: Any = type(module)(module.config).to(hold)
    module.register_buffer(name, getattr(made, name), persistent=False)


def _full_shape(module: nn.Module, old: Tensor) -> tuple[int, ...]:
    from torch import nn

    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(old.shape)


def shape_tokenizer(path: str, part: str) -> Any:
    """A tokenizer of bytes, which needs no vocabulary: any text gives ids within both encoders' vocabularies."""
    from transformers import ByT5Tokenizer

    family = of_config(shape_config(path, "transformer"))
    (encoder,) = (encoder for encoder in family.ENCODERS if encoder.tokenizer == part)
    tokenizer = ByT5Tokenizer(model_max_length=family.TOKENS[path] if encoder.large else 77)
    tokenizer.chat_template = CHAT
    return tokenizer


def shape_scheduler(path: str) -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**shape_config(path, "scheduler"))
