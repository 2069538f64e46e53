"""A recovery adapter's pairs from the errors of the quantized layers, and their training towards the bf16 model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from infer.adapter.lora import RECOVERY
from infer.adapter.read import Pair, Pairs
from infer.adapter.targets import base_layers
from infer.checkpoint.originals import Originals
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import dequantized, stored_bytes
from infer.rounding.calibration import Record, Rows, stacked
from infer.rounding.lowrank import Factors, allot, approximate

if TYPE_CHECKING:
    from infer.recover import Recover


def recovered(transformer: FluxTransformer2DModel, originals: Originals, rows: dict[str, Rows], options: Recover,
              device: torch.device) -> Pairs:  # fmt: skip
    """The adapter's pairs, in bf16."""
    factors: dict[str, Factors] = {}
    costs = {}
    for name, layer in tqdm(base_layers(transformer).items(), unit="layer", desc="approximating errors"):
        error = originals.weight(name).to(device) - dequantized(layer).to(device)
        seen = rows.pop(name)
        inputs, gradients = torch.cat(seen.inputs).to(device), torch.cat(seen.gradients).to(device)
        own = approximate(error, inputs, gradients, options.most, seen.tokens)
        factors[name] = Factors(own.down.bfloat16().cpu(), own.up.bfloat16().cpu(), own.gains.cpu())
        costs[name] = 2 * sum(error.shape)
    budget = int(options.share * stored_bytes(transformer))
    ranks = allot({name: own.gains for name, own in factors.items()}, costs, budget)
    return {
        name: Pair(factors[name].down[:rank].contiguous(), factors[name].up[:, :rank].contiguous(), 1.0)
        for name, rank in ranks.items()
    }


def polish(
    transformer: FluxTransformer2DModel, records: list[Record], exact: Tensor, options: Recover, device: torch.device
) -> None:
    """Train the attached recovery adapter towards the velocities `exact` of the records."""
    parameters = [p for name, p in transformer.named_parameters() if f".{RECOVERY}." in name]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=options.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.polish)
    generator = torch.Generator().manual_seed(options.seed)
    order = [int(i) for _ in range(-(-options.polish // len(records))) for i in
             torch.randperm(len(records), generator=generator)][: options.polish]  # fmt: skip
    dtype = compute_dtype_of(transformer)
    for at in tqdm(order, unit="step", desc="polishing"):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = transformer(**stacked([records[at]], device, dtype))[0]
        wanted = exact[at : at + 1].to(device)
        ((found.float() - wanted).square().mean() / wanted.square().mean()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
        parameter.requires_grad_(False)
