"""What a transformer's layers see and what its output feels of them: rows of inputs and of gradients, by layer.

Records are the transformer's own inputs while it draws pictures: every prompt, every step.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from infer.adapter.targets import base_layers
from infer.checkpoint.load import Model, load_scheduler, own_size
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling, draw

Record = dict[str, Any]
OWN = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")  # one row a picture


@dataclass
class Rows:
    """Of one layer, on the CPU in fp32, scaled so that their Gram matrices are those of all tokens."""

    inputs: list[Tensor] = field(default_factory=list)  # [rows, in]
    gradients: list[Tensor] = field(default_factory=list)  # [rows, out]
    tokens: int = 0


def record(
    transformer: FluxTransformer2DModel,
    model: Model,
    precision: Precision,
    prompts: list[str],
    sampling: Sampling,
    seed: int,
    device: torch.device,
) -> list[Record]:
    """Draw each prompt once (seed, seed + 1, ...) and keep what the transformer is given at every step."""
    with text_encoder(model, precision, device, None) as encoder:
        texts = encoder(prompts)
    records: list[Record] = []

    def keep(module: nn.Module, args: Any, given: Record) -> None:
        records.append({key: value.cpu() if isinstance(value, Tensor) else value for key, value in given.items()})

    handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for i, text in enumerate(tqdm(texts, unit="picture", desc="drawing what the layers shall see")):
            draw(transformer, load_scheduler(model), text, seed + i, sampling, sampling.size(own_size(model)), device)
    finally:
        handle.remove()
    return records


def stacked(records: list[Record], device: torch.device, dtype: torch.dtype) -> Record:
    """Records as one batch."""
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in records[0].items()}
    for key in OWN:
        if batch.get(key) is not None:
            batch[key] = torch.cat([one[key] for one in records]).to(device)
    for key in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        batch[key] = batch[key].to(dtype)
    return batch | {"return_dict": False}


def velocities(transformer: FluxTransformer2DModel, records: list[Record], device: torch.device, size: int) -> Tensor:
    """What the transformer says to the records, [records, tokens, channels] in fp32 on the CPU; `size` at a time."""
    found = []
    with torch.no_grad():
        for i in tqdm(range(0, len(records), size), unit="batch", desc="velocities"):
            batch = stacked(records[i : i + size], device, compute_dtype_of(transformer))
            found.append(transformer(**batch)[0].float().cpu())
    return torch.cat(found)


def relative_errors(found: Tensor, exact: Tensor) -> Tensor:
    """||found - exact|| / ||exact|| of each record, [records]."""
    errors: Tensor = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return errors


def collect(
    transformer: FluxTransformer2DModel, records: list[Record], rows: int, seed: int, device: torch.device
) -> dict[str, Rows]:
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
