"""A transformer of either family for the fast path's tests: how it is adapted and called."""

from typing import Any

import torch
from torch import Tensor

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.quantize.precision import Precision
from train.objective.flow_matching import predict

CPU = torch.device("cpu")


def load(model: Model, precision: Precision) -> Any:
    """A family's transformer at a precision on the CPU."""
    return load_transformer(model, precision, CPU)


def make(precision: Precision, adapter: Adapter, model: Model) -> tuple[Any, list[Tensor]]:
    transformer = load(model, precision).train()
    parameters: list[Tensor] = list(attach(transformer, adapter, 0))
    noise = torch.Generator().manual_seed(1)
    for parameter in parameters:  # B starts as zero: its layer would learn nothing about A
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    return transformer, parameters


def velocity(transformer: Any, noise: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """What the transformer says of random latents; shape: how many, and their height and width in latents."""
    config, (batch, height, width) = transformer.config, shape
    x = torch.randn(batch, config.in_channels // 4, height, width, generator=noise)
    text = torch.randn(batch, 20, config.joint_attention_dim, generator=noise)
    if "pooled_projection_dim" not in config:
        # FLUX.2 rounds its timesteps, and 1000 times them, to bf16
        return predict(transformer, x, text, None, torch.tensor([0.25, 0.5])[:batch], 1.0, dtype)
    pooled = torch.randn(batch, config.pooled_projection_dim, generator=noise)
    return predict(transformer, x, text, pooled, torch.rand(batch, generator=noise), 1.0, dtype)
