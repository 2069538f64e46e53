"""Weights as NF4 stores them, while a model is trained (within a CUDA graph) and while it is drawn with."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from infer.fast.dequantize import four_bit_values

BLOCK = 64  # weights that share a scale
Model = TypeVar("Model", bound=nn.Module)


def linear(model: nn.Module, but: Sequence[str] = ()) -> list[nn.Linear]:
    """The linear layers, which a precision rounds, but for those whose last name is one of `but`."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in but
    ]


class Rounding:
    """Layers whose weights are rounded to NF4 for the time of a step where `on` is 1, and kept as they are at 0.

    Gradients are those at the rounded weights, and move the exact ones. All on the device, for a CUDA graph.

    Raises:
        ValueError: a weight does not fill whole blocks.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weights = [layer.weight for layer in layers]
        self.sizes = [weight.numel() for weight in self.weights]
        for weight in self.weights:
            if weight.numel() % BLOCK:
                raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fill blocks of {BLOCK}")
        device = self.weights[0].device
        self.levels = four_bit_values("nf4", device)
        self.between = (self.levels[1:] + self.levels[:-1]) / 2
        self.kept = [weight.detach().clone() for weight in self.weights]
        self.on = torch.zeros((), device=device)

    def begin(self) -> None:
        """Round the weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.kept, self.weights)
            exact = torch.cat([weight.flatten() for weight in self.weights]).view(-1, BLOCK)
            scale = exact.abs().amax(1, keepdim=True).clamp(min=1e-12)
            found = self.levels[torch.bucketize(exact / scale, self.between, out_int32=True)] * scale
            moved = ((found - exact) * self.on).flatten().split(self.sizes)
            torch._foreach_add_(self.weights, [m.view_as(w) for m, w in zip(moved, self.weights, strict=True)])

    def end(self) -> None:
        """Put the exact weights back."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.kept)


def stored(model: Model, kind: str, but: Sequence[str] = ()) -> Model:
    """A copy in bf16; of kind nf4 or fp4, with its linear layers rounded so, but for those named."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    found = copy.deepcopy(model).to(torch.bfloat16)
    if kind != "bf16":
        for layer in linear(found, but):
            packed, state = quantize_4bit(layer.weight.data, blocksize=BLOCK, quant_type=kind)
            values: Tensor = dequantize_4bit(packed, state)
            layer.weight.data = values
    return found
