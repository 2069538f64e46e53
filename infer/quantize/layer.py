"""One layer's weight -> what bitsandbytes stores of it at a precision, and what products then see."""

from typing import Any

import torch
from torch import Tensor, nn

from infer.quantize.precision import Precision
from infer.quantize.storage import dequantized, int8_values


def quantized_layer(weight: Tensor, precision: Precision, device: torch.device) -> nn.Linear:
    """A bitsandbytes layer without bias that holds `weight` [out, in], rounded as loading a checkpoint rounds it."""
    import bitsandbytes as bnb

    rows, width = weight.shape
    weight = weight.to(precision.dtype)
    layer: Any
    if precision.kind == "int8":
        layer = bnb.nn.Linear8bitLt(width, rows, bias=False, has_fp16_weights=False, device="meta")
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half().to(device))
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        return layer  # type: ignore[no-any-return]
    layer = bnb.nn.Linear4bit(
        width, rows, False, precision.dtype, precision.double_quant, precision.kind, torch.uint8, device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=precision.double_quant,
        quant_type=precision.kind,
        quant_storage=torch.uint8,
        module=layer,
    ).to(device)
    return layer  # type: ignore[no-any-return]


def rounded(weight: Tensor, precision: Precision, device: torch.device) -> Tensor:
    """The weight [out, in] in fp32 on the CPU as it takes part in products at this precision."""
    if not precision.quantized:
        return weight.to(precision.dtype).float()
    return dequantized(quantized_layer(weight, precision, device)).cpu()


def quantized_values(weight: Tensor, kind: str, double_quant: bool, dtype: torch.dtype) -> Tensor:
    """The values [out, in] that take part in products in `dtype` once a weight is stored as int8, fp4 or nf4."""
    import bitsandbytes.functional as bnb

    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return int8_values(codes, scales, dtype)
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type=kind
    )
    state.dtype = dtype  # else it rounds to the weight's
    values: Tensor = bnb.dequantize_4bit(packed, state)
    return values
