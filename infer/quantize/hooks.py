"""Where diffusers quantizes a model while it reads it: on a CPU too, and held elsewhere than it was quantized."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def quantizing_on(device: torch.device, hold: torch.device) -> Iterator[None]:
    """Within, diffusers quantizes on `device`, layer by layer, and keeps each on `hold`. On a CPU its two quantizers
    refuse before bitsandbytes is asked.

    Raises:
        ValueError: the device is neither CUDA nor CPU.
    """
    if device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"int8, fp4 and nf4 need a CUDA device or a CPU, not {device}: set precision=bf16 or device=cpu"
        )
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    quantizers: tuple[Any, Any] = (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer)
    names = ("validate_environment", "update_device_map", "create_quantized_param")
    own = [(quantizer, name, getattr(quantizer, name)) for quantizer in quantizers for name in names]
    for quantizer, name, method in own:
        if name == "validate_environment" and hold.type == "cpu":
            setattr(quantizer, name, lambda self, *args, **kwargs: None)
        if name == "update_device_map":
            setattr(quantizer, name, lambda self, device_map: device_map or {"": hold})
        if name == "create_quantized_param" and hold != device:
            setattr(quantizer, name, _quantize_then_hold(method, device, hold))
    try:
        yield
    finally:
        for quantizer, name, method in own:
            setattr(quantizer, name, method)


def _quantize_then_hold(method: Any, device: torch.device, hold: torch.device) -> Any:
    def create(self: Any, model: nn.Module, value: Any, name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        method(self, model, value, name, device, *args, **kwargs)
        module, _, tensor = name.rpartition(".")
        layer = model.get_submodule(module)
        layer._parameters[tensor] = held(getattr(layer, tensor), hold)

    return create


def held(parameter: nn.Parameter, hold: torch.device) -> nn.Parameter:
    """A parameter on another device, of its own class, with its quantization constants.

    bitsandbytes' classes move them along; a plain parameter's `to` gives a tensor, which no module takes as its own.
    """
    moved = parameter.to(hold)
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, parameter.requires_grad)
