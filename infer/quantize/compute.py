"""The dtype in which a device computes, whatever the weights are stored in.

CPUs without AVX-512 (most AMD and consumer Intel ones) have no quick bf16: oneDNN falls back to loops that take some
twenty times fp32's time for a product or a convolution. There everything computes in fp32, and so does an fp16 request
on a CPU without fp16 products. Weights stay stored as they are asked for: each is cast when its layer is called.

NVIDIA cards before Ampere (T4, RTX 20) have no bf16 at all. There fp16 takes its place, for what is stored too, and
the transformer multiplies and carries as in infer/fast/half.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from infer.program.note import note
from infer.quantize.multiply import multiply_plainly
from infer.quantize.precision import Precision

# Modules that cast activations to the dtype in which some of their weights are stored: T5's feed-forward layers before
# `wo`, the autoencoder's decoder before its first block that enlarges
CAST_TO_STORED = ("T5DenseActDense", "T5DenseGatedActDense", "Decoder")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compute_dtype(asked: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products and convolutions on a device where `asked` is what weights are stored in."""
    if device.type == "cuda" and asked == torch.bfloat16 and not _bf16_on_card(device):
        note(
            f"{torch.cuda.get_device_name(device)} has no bf16: products in fp16 of rows scaled into its range, the "
            "residual stream, norms and adapters in fp32"
        )
        return torch.float16
    if device.type != "cpu" or asked == torch.float32 or _quick_on_cpu(asked):
        return asked
    note(f"this CPU has no quick {NAMES[asked]}: computing in fp32 (weights are stored as asked)")
    return torch.float32


def stored_on(precision: Precision, device: torch.device) -> Precision:
    """The precision as a device stores it: with fp16 in the place of bf16 on a card without bf16."""
    if precision.dtype != torch.bfloat16 or compute_dtype(torch.bfloat16, device) != torch.float16:
        return precision
    return replace(precision, compute_dtype="fp16")


def small_dtype(device: torch.device) -> torch.dtype:
    """What CLIP and the autoencoder are stored in: bf16, and fp32 on a card without it, where the autoencoder's own
    config asks for more than fp16 (force_upcast)."""
    lacking = compute_dtype(torch.bfloat16, device) == torch.float16
    return torch.float32 if lacking else torch.bfloat16


@cache
def _bf16_on_card(device: torch.device) -> bool:
    if not torch.cuda.is_available():
        return True  # nothing is computed on a card that is not here
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@cache
def _quick_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in a half-width dtype on this CPU, under the limits set by its environment."""
    if not torch.backends.mkldnn.is_available():
        return False
    ask = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return bool(getattr(torch.ops.mkldnn, ask)())


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a model compute in a dtype other than the one it is stored in; see `compute_dtype_of`.

    Every module with weights of its own casts its floating inputs and, for the time of a call, its weights; 4-bit and
    int8 ones are dequantized to that dtype. No activation is rounded to the stored dtype on the way.
    """
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return
    import bitsandbytes as bnb

    model._compute_dtype = dtype  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
        if any(p.is_floating_point() and p.dtype != dtype for p in module.parameters(recurse=False)):
            module.forward = _casting(module, module.forward, dtype)
        if type(module).__name__ in CAST_TO_STORED:
            module.forward = _unrounded(module.forward, dtype)

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(_cast(value, dtype) for value in args), {name: _cast(v, dtype) for name, v in kwargs.items()}

    model.register_forward_pre_hook(given, with_kwargs=True)


def compute_wide(model: nn.Module) -> None:
    """Have a language model that is stored for products in fp16 compute in fp32, int8 layers too: its residual stream
    grows beyond fp16 (T5 has layers for that which transformers keeps in fp32, Qwen3 and Mistral have none)."""
    compute_in(model, torch.float32)
    multiply_plainly(model)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _casting(module: nn.Module, forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def computing(*args: Any, **kwargs: Any) -> Any:
        stored = dict(module._parameters)
        # the casts, and not the parameters, are what autograd keeps for the backward pass
        module._parameters.update({name: _cast(value, dtype) for name, value in stored.items()})
        try:
            given = (_cast(value, dtype) for value in args)
            return forward(*given, **{name: _cast(value, dtype) for name, value in kwargs.items()})
        finally:
            module._parameters.update(stored)

    return computing


class _Unrounded(TorchFunctionMode):
    """Within, a cast of a floating tensor to any floating dtype but one gives the tensor as it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype):
            floating = args[0].is_floating_point() and args[1].is_floating_point
            if floating and args[1] != self.dtype:
                return args[0]
        return func(*args, **(kwargs or {}))


def _unrounded(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def computing(*args: Any, **kwargs: Any) -> Any:
        with _Unrounded(dtype):
            return forward(*args, **kwargs)

    return computing


def is_adapters(name: str) -> bool:
    """Whether a parameter's name is one of PEFT's for adapters of any kind."""
    return any(f".{kind}_" in name for kind in ("lora", "lokr", "hada", "oft"))


def compute_dtype_of(model: Any) -> torch.dtype:
    """The dtype that a model computes in, and in which its inputs are given."""
    model = getattr(model, "module", model)  # DistributedDataParallel wraps it
    found: torch.dtype | None = model.__dict__.get("_compute_dtype")
    if found is not None:
        return found
    # not diffusers' `model.dtype`: in a quantized FLUX.2, which has no biases, an adapter's is the first it finds
    own = (p.dtype for name, p in model.named_parameters() if p.is_floating_point() and not is_adapters(name))
    dtype: torch.dtype = next(own, model.dtype)
    return dtype


def product_dtype_of(model: Any) -> torch.dtype:
    """The dtype of a model's matrix products."""
    return torch.float16 if in_half(model) else compute_dtype_of(model)


def in_half(model: nn.Module) -> bool:
    """Whether a model carries fp32 and multiplies in fp16 (infer/fast/half.py)."""
    return "_in_half" in model.__dict__
