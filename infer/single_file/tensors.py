"""A single file's tensors by their names in the file, each read and dequantized when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from infer.single_file.header import is_gguf, open_gguf, read_header

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Tensors:
    """An open file. What is quantized in it comes out in fp32, all else as it is stored."""

    def __init__(self, file: Path, device: torch.device) -> None:
        """device: on which tensors are dequantized and given."""
        self.header, self.device = read_header(file), device
        self.gguf: dict[str, Any] | None = None
        if is_gguf(file):
            self.gguf = {tensor.name: tensor for tensor in open_gguf(file).tensors}
        else:
            self.file: Any = safe_open(file, framework="pt")

    def read(self, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """A tensor, or `rows` of its rows from `start` on: only those are read."""
        end = None if rows is None else start + rows
        if self.gguf is not None:
            return _from_gguf(self.gguf[name], start, end, self.device)
        if not self.header.tensors[name].shape:
            whole: Tensor = self.file.get_tensor(name)
            return whole.to(self.device)
        value: Tensor = self.file.get_slice(name)[start:end].to(self.device)
        if value.dtype not in FP8:
            return value
        value = value.float()
        scale = self.header.scale_of(name)
        if scale is not None:
            factor: Tensor = self.file.get_tensor(scale).to(self.device).float().flatten()
            value *= factor if factor.numel() == 1 else factor[start:end, None]
        return value


def _from_gguf(tensor: Any, start: int, end: int | None, device: torch.device) -> Tensor:
    """Rows of a GGUF's tensor, dequantized by diffusers' functions."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = tensor.tensor_type
    value = torch.from_numpy(tensor.data[start:end].copy()).to(device)  # a copy: the file is mapped for reading alone
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return value
    block, size = gguf.GGML_QUANT_SIZES[kind]
    found: Tensor = dequantize_functions[kind](value.view(-1, size), block, size, dtype=torch.float32)
    found = found.reshape(*value.shape[:-1], value.shape[-1] // size * block)
    return found.bfloat16() if kind == gguf.GGMLQuantizationType.BF16 else found
