"""What lies in memory of a layer's weight at a precision: its bytes, and the values that take part in products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

from infer.quantize.precision import kind_of


def scales_of(layer: Any) -> Tensor:
    """An int8 layer's absmax of each row [out]; the first forward pass moves it."""
    scales: Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scales


def int8_values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [out, in] of int8 codes [out, in], whose rows have the absmax `scales` [out]."""
    return (codes.float() * (scales / 127.0)[:, None]).to(dtype)


def weight_bytes(rows: int, columns: int, kind: str | None, double_quant: bool, itemsize: int = 2) -> int:
    """Bytes of a linear layer's weight [rows, columns] as int8, fp4 or nf4, quantization constants included (as
    `stored_bytes` counts them), or unquantized with so many bytes a value."""
    count = rows * columns
    if kind == "int8":
        return count + 4 * rows  # an absmax in fp32 for each row
    if kind not in ("fp4", "nf4"):
        return itemsize * count
    blocks = -(-count // 64)
    packed = (count + 1) // 2 + 16 * 4  # the code's sixteen values
    if not double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // 256) + 256 * 4 + 4  # outer absmax, their code, the offset


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers as they lie in memory, quantization constants included."""
    from torch import Tensor

    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        total += tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            parts = (state.absmax, state.code, state.offset)
            total += sum(t.numel() * t.element_size() for t in parts if isinstance(t, Tensor))
            state = state.state2
    for module in model.modules():
        if kind_of(module) == "int8":
            scales = scales_of(module)
            total += scales.numel() * scales.element_size()
    return total


def dequantized(layer: nn.Linear) -> Tensor:
    """A layer's weight [out, in] as it takes part in products, in fp32; any kind."""
    import bitsandbytes as bnb

    weight: Any = layer.weight
    rows: Tensor
    kind = kind_of(layer)
    if kind == "int8":
        rows = bnb.functional.int8_vectorwise_dequant(weight.data, scales_of(layer))
        return rows.float()
    if kind is not None:
        rows = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return rows.float()
    rows = weight.detach()
    return rows.float()
