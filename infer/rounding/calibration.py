"""What a transformer's layers read and what its output feels of them: rows of inputs and of gradients, by layer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infer.adapter.targets import base_layers
from infer.quantize.compute import compute_dtype_of
from infer.rounding.records import Record, stacked


@dataclass
class Rows:
    """Of one layer, on the CPU in fp32, scaled so that their Gram matrices are those of all tokens."""

    inputs: list[Tensor] = field(default_factory=list)  # [rows, in]
    gradients: list[Tensor] = field(default_factory=list)  # [rows, out]
    tokens: int = 0


def collect(transformer: Any, records: list[Record], rows: int, seed: int, device: torch.device) -> dict[str, Rows]:
    """About `rows` rows of every linear layer's inputs, and of the gradients of random projections of the velocity.

    The transformer must be frozen and without adapters; its gradient checkpointing may be on.
    """
    layers = base_layers(transformer)
    found = {name: Rows() for name in layers}
    generator = torch.Generator().manual_seed(seed)
    each = -(-rows // len(records))
    seen: set[str] = set()

    def picked(tensor: Tensor) -> Tensor:
        flat = tensor.detach().flatten(0, -2)
        count = min(each, len(flat))
        at = torch.randperm(len(flat), generator=generator)[:count].to(flat.device)
        rows: Tensor = flat[at].float().cpu() * (len(flat) / count) ** 0.5
        return rows

    def watch(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            first = name not in seen  # checkpointing computes a block again
            seen.add(name)
            if first:
                found[name].inputs.append(picked(args[0]))
                found[name].tokens += args[0].numel() // args[0].shape[-1]
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            if first:
                output.register_hook(lambda gradient: found[name].gradients.append(picked(gradient)))
            return output

        return after

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is not safe in every layout (torch 2.11)
    try:
        with torch.enable_grad():
            for one in tqdm(records, unit="record", desc="what each layer sees and does"):
                seen.clear()
                velocity = transformer(**stacked([one], device, compute_dtype_of(transformer)))[0]
                probe = torch.randn(velocity.shape, generator=generator).to(velocity)
                velocity.backward(probe)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for handle in handles:
            handle.remove()
    return found
