"""A recovery adapter's pairs from the errors of the quantized layers, and their training towards the bf16 model."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infer.adapter.attach import put_pairs
from infer.adapter.attached import save_adapter
from infer.adapter.lora import RECOVERY
from infer.adapter.read import Pair, Pairs
from infer.adapter.targets import base_layers
from infer.checkpoint.family import own_size
from infer.checkpoint.files import read_config
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import load_transformer
from infer.checkpoint.originals import Originals, transformer_from_shards
from infer.device.device import release
from infer.program.atomic import replace_file
from infer.program.run_names import check_run_name
from infer.quantize.compute import compute_dtype, compute_dtype_of
from infer.quantize.precision import kind_asked
from infer.quantize.storage import dequantized, stored_bytes
from infer.rounding.calibration import Rows, collect
from infer.rounding.layer_errors import decide
from infer.rounding.lowrank import Factors, allot, approximate
from infer.rounding.records import Record, batches, record, stacked, velocities
from infer.rounding.settings import Recover


def make_recovery(options: Recover, device: torch.device) -> Path:
    """Make and measure a recovery adapter; returns its folder.

    Raises:
        ValueError: the device has no bf16, no layer is quantized, `share` is too small, or the checkpoint has no
            unquantized weights.
    """
    if compute_dtype(torch.bfloat16, device) == torch.float16:
        raise ValueError(
            f"{device} has no bf16, in which the unquantized model is run here; make the recovery adapter on a card "
            "from 2020 on (RTX 30, A10, A100), or with device=cpu: it is read on this one"
        )
    folder, layers = check_run_name(options.run), linear_shapes(read_config(options.model, "transformer"))
    originals = Originals(options.model)
    options.precision = decide(options.model, options.precision, device, print)
    if not options.precision.quantized or not any(kind_asked(options.precision, name) for name in layers):
        raise ValueError("no layer of the transformer is quantized, so nothing is lost; choose another precision")
    transformer = load_transformer(options.model, options.precision, device)
    size = stored_bytes(transformer)
    record_all = partial(
        record,
        transformer,
        options.model,
        options.precision,
        sampling=options.sampling,
        size=options.sampling.size(own_size(options.model)),
        device=device,
    )
    records = record_all(options.prompts, options.seed)
    unseen = record_all(options.held_out, options.seed + 100_000)
    before = _velocities(transformer, unseen, 1, device)
    transformer.enable_gradient_checkpointing()
    rows = collect(transformer, records, options.rows, options.seed, device)
    pairs = recovered(transformer, originals, rows, options, device)
    if not pairs:
        raise ValueError(f"share is {options.share}: too little for rank 1 anywhere; raise it")
    put_pairs(transformer, pairs, RECOVERY)
    release(device)
    teacher = transformer_from_shards(options.model, device, compute_dtype(torch.bfloat16, device))
    if options.polish:
        polish(transformer, records, _velocities(teacher, records, 16, device), options, device)
    exact = _velocities(teacher, unseen, 16, device)
    after = _velocities(transformer, unseen, 1, device)
    errors = [float(relative_errors(found, exact).square().mean().sqrt()) for found in (before, after)]
    # in bf16, as `share` is given; a CPU that computes in fp32 holds twice that meanwhile
    added = 2 * sum(pair.down.numel() + pair.up.numel() for pair in pairs.values())
    figures = {
        "relative_velocity_error_before": errors[0],
        "relative_velocity_error_after": errors[1],
        "gap_closed": 1 - errors[1] / errors[0],
        "bytes": added,
        "share": added / size,
        "records": len(records),
        "held_out_records": len(unseen),
        "ranks": {name: pair.down.shape[0] for name, pair in pairs.items()},
    }
    notes = {"recovers": {"base": fingerprint(options.model, "transformer")}, "precision": asdict(options.precision)}
    save_adapter(transformer, folder / "adapter", notes | {"figures": figures}, RECOVERY)
    text = json.dumps(figures, indent=2) + "\n"
    replace_file(folder / "recovery.json", lambda path: path.write_text(text))
    print(
        f"velocity error against bf16 on {len(unseen)} unseen records: {errors[0]:.4f} -> {errors[1]:.4f} "
        f"({100 * figures['gap_closed']:.1f} % of the gap closed) with {100 * figures['share']:.2f} % more bytes\n"  # type: ignore[operator]
        f"recovery adapter: {folder / 'adapter'}"
    )
    return folder / "adapter"


def _velocities(transformer: Any, records: list[Record], size: int, device: torch.device) -> Tensor:
    """The transformer's answers to records, `size` at a time, on the CPU."""
    calls = batches(records, size, device, compute_dtype_of(transformer))
    bar = tqdm(calls, total=-(-len(records) // size), unit="batch", desc="velocities")
    return velocities(transformer, bar, torch.device("cpu"))


def relative_errors(found: Tensor, exact: Tensor) -> Tensor:
    """||found - exact|| / ||exact|| of each record, [records]."""
    errors: Tensor = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return errors


def recovered(transformer: Any, originals: Originals, rows: dict[str, Rows], options: Recover,
              device: torch.device) -> Pairs:  # fmt: skip
    """The adapter's pairs, in bf16."""
    factors: dict[str, Factors] = {}
    costs = {}
    for name, layer in tqdm(base_layers(transformer).items(), unit="layer", desc="approximating errors"):
        error = originals.weight(name).to(device) - dequantized(layer).to(device)
        collected = rows.pop(name)
        inputs, gradients = torch.cat(collected.inputs).to(device), torch.cat(collected.gradients).to(device)
        found = approximate(error, inputs, gradients, options.most, collected.tokens)
        factors[name] = Factors(found.down.bfloat16().cpu(), found.up.bfloat16().cpu(), found.gains.cpu())
        costs[name] = 2 * sum(error.shape)
    budget = int(options.share * stored_bytes(transformer))
    ranks = allot({name: each.gains for name, each in factors.items()}, costs, budget)
    return {
        name: Pair(factors[name].down[:rank].contiguous(), factors[name].up[:, :rank].contiguous(), 1.0)
        for name, rank in ranks.items()
    }


def polish(transformer: Any, records: list[Record], exact: Tensor, options: Recover, device: torch.device) -> None:
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
