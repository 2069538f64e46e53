"""How bitsandbytes' layers multiply: weights are dequantized as they lie, in the dtype of the products."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from infer.quantize.precision import kind_of
from infer.quantize.storage import int8_values, scales_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they were quantized, on a CPU with AVX512-BF16 too.

    There bitsandbytes repacks them at the first forward pass in eval mode, and cannot undo it: absmax stays transposed
    and in bf16 (0.50.2, functional._convert_weight_packed_for_cpu_inverse), so that a state_dict or an adapter that
    comes later reads garbage. Without it a forward pass of the bundled model takes 34 ms in place of 26.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantize_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Have 4-bit layers dequantize to a dtype, whatever the checkpoint was saved with."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            state: Any = module.weight.quant_state
            if state is not None:
                state.dtype = dtype


def multiply_plainly(model: nn.Module) -> None:
    """Have int8 layers dequantize their weights and multiply in the activations' own dtype.

    LLM.int8 quantizes the activations too and takes its outliers apart: 2.4 times slower than NF4 in training and in
    sampling at 4,608 tokens (H200), where the product is what costs and not the reading of weights.
    """
    for module in model.modules():
        if kind_of(module) == "int8":
            module.forward = partial(_plain_int8, module)


def keep_scales(model: nn.Module) -> None:
    """Have LLM.int8's layers keep their scales beside DoRA on a CPU.

    There PEFT makes a layer's weight anew after each use (0.21.2, dequantize_module_weight), with its codes but without
    the scales, which the layer took into its state; the next forward pass would put none in their place (bitsandbytes
    0.50.2, init_8bit_state).
    """
    for module in model.modules():
        if kind_of(module) == "int8":
            module.register_forward_pre_hook(_take_scales_once)


def _take_scales_once(layer: Any, args: object) -> None:
    if layer.weight.SCB is None and layer.state.SCB is not None:
        layer.weight.CB = None


def _plain_int8(layer: Any, x: Tensor) -> Tensor:
    from torch.nn import functional

    weight = int8_values(layer.weight.data, scales_of(layer), x.dtype)
    return functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
