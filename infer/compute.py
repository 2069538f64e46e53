"""The dtype in which a device computes, whatever the weights are stored in.

CPUs without AVX-512 (most AMD and consumer Intel ones) have no quick bf16: oneDNN falls back to loops that take some
twenty times fp32's time for a product or a convolution. There everything computes in fp32, and so does an fp16 request
on a CPU without fp16 products. Weights stay stored as they are asked for: each is cast when its layer is called.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compute_dtype(asked: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products and convolutions on a device where `asked` is what weights are stored in."""
    if device.type != "cpu" or asked == torch.float32 or _quick_on_cpu(asked):
        return asked
    _note(NAMES[asked])
    return torch.float32


@cache
def _quick_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in a half-width dtype on this CPU, under the limits set by its environment."""
    if not torch.backends.mkldnn.is_available():
        return False
    ask = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return bool(getattr(torch.ops.mkldnn, ask)())


@cache
def _note(asked: str) -> None:
    """One line a process, of the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: this CPU has no quick {asked}: computing in fp32 (weights are stored as asked)", file=sys.stderr)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a model compute in a dtype other than the one it is stored in; see `compute_dtype_of`.

    Every module with weights of its own casts its floating inputs and, for the time of a call, its weights; 4-bit and
    int8 ones are dequantized to that dtype.
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


def _casting(module: nn.Module, forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def computing(*args: Any, **kwargs: Any) -> Any:
        stored = dict(module._parameters)
        # the casts, and not the parameters, are what autograd keeps for the backward pass
        module._parameters.update({name: cast(value) for name, value in stored.items()})
        try:
            return forward(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
        finally:
            module._parameters.update(stored)

    return computing


def compute_dtype_of(model: Any) -> torch.dtype:
    """The dtype that a model computes in, and in which its inputs are given."""
    model = getattr(model, "module", model)  # DistributedDataParallel wraps it
    found: torch.dtype | None = model.__dict__.get("_compute_dtype")
    return found if found is not None else model.dtype
