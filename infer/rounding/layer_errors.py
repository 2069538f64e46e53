"""The velocity's error when each group of layers alone is quantized, measured, and kept for precision=auto."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infer.checkpoint.family import own_size
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.fast.install import choose_path
from infer.fast.memory import Memory
from infer.fast.weights import groups
from infer.program.atomic import replace_file
from infer.quantize.compute import compute_dtype_of, product_dtype_of
from infer.quantize.layer import quantized_values
from infer.quantize.precision import Precision, linear_layers
from infer.quantize.storage import stored_bytes, weight_bytes
from infer.rounding.budget import choose
from infer.rounding.records import Record, record, stacked, velocities
from infer.rounding.settings import Sensitivity
from infer.sample.generate import Sampling, settled

KEPT = Path("runs/cache")
KINDS = ("nf4", "int8")


def calls_of(records: list[Record], steps: int, transformer: Any, device: torch.device) -> list[Record]:
    """One call for each step, of all pictures together."""
    return [stacked(records[step::steps], device, compute_dtype_of(transformer)) for step in range(steps)]


def _bytes(layer: nn.Linear, kind: str, double_quant: bool = False) -> int:
    return weight_bytes(layer.out_features, layer.in_features, kind, double_quant)


def measure(
    transformer: Any, calls: list[Record], double_quant: bool, tick: Callable[[], object]
) -> list[dict[str, Any]]:
    """For each group of layers that read one input: its `layers`, and by kind the `errors` (the mean over samples of
    the squared relative error of the velocity when it alone is of that kind) and the `bytes` that it takes."""
    layers = linear_layers(transformer)
    device = calls[0]["hidden_states"].device
    exact = velocities(transformer, calls, device)
    norms = exact.flatten(1).square().sum(1)
    dtype = product_dtype_of(transformer)
    found = []
    for names in groups(layers):
        errors = {"bf16": 0.0}
        weights: list[Tensor] = [layers[name].weight for name in names]
        for kind in KINDS:
            with _holding(weights, [quantized_values(weight.data, kind, double_quant, dtype) for weight in weights]):
                off = (velocities(transformer, calls, device) - exact).flatten(1).square().sum(1)
            errors[kind] = float((off / norms).mean())
            tick()
        sizes = {kind: sum(_bytes(layers[name], kind, double_quant) for name in names) for kind in errors}
        found.append({"layers": names, "errors": errors, "bytes": sizes})
    return found


@contextmanager
def _holding(weights: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Within, the weights hold these values: in place if they are of one dtype, since the fast path has stacks of which
    the weights are views. Products in fp32 of stored bf16, as some CPUs have, see values that bf16 cannot hold."""
    kept = [weight.data for weight in weights]
    whole = values[0].dtype == kept[0].dtype
    before = [data.clone() if whole else data for data in kept]
    for weight, value in zip(weights, values, strict=True):
        if whole:
            weight.data.copy_(value)
        else:
            weight.data = value
    try:
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            if whole:
                weight.data.copy_(data)
            else:
                weight.data = data


def sensitivities(options: Sensitivity, device: torch.device, say: Callable[[str], object]) -> dict[str, Any]:
    """`groups` of layers with their errors (see `measure`), and the transformer's `other_bytes`: what is no weight of a
    linear layer."""
    side = min(512, own_size(options.model))
    size = options.sampling.height or side, options.sampling.width or side
    precision = Precision("bf16")
    transformer = load_transformer(options.model, precision, device)
    layers = linear_layers(transformer)
    if all(layer.weight.dtype == product_dtype_of(transformer) for layer in layers.values()):  # see _holding
        choose_path(transformer, Memory(keep="everything", compile=False, graph=False), precision, device, say)
    other = stored_bytes(transformer) - sum(_bytes(layer, "bf16") for layer in layers.values())
    records = record(transformer, options.model, precision, options.prompts, 0, options.sampling, size, device)
    steps = settled(options.sampling, options.model).steps
    assert steps is not None
    calls = calls_of(records, steps, transformer, device)
    with tqdm(total=len(groups(layers)) * len(KINDS), unit="layer", desc="sensitivity") as bar:
        found = measure(transformer, calls, options.double_quant, bar.update)
    del transformer, layers
    release(device)
    return {"prompts": options.prompts, "double_quant": options.double_quant, "other_bytes": other, "groups": found}


def kept_file(model: Model, double_quant: bool) -> Path:
    """Where a model's measurement is kept for precision=auto."""
    return KEPT / f"sensitivity-{fingerprint(model, 'transformer')[:16]}{'-double' if double_quant else ''}.json"


def decide(model: Model, precision: Precision, device: torch.device, say: Callable[[str], object]) -> Precision:
    """A precision of kind auto -> the mixture of nf4, int8 and bf16 that its budget buys; others are returned as they
    are. Layers are measured once for a model, with the command's defaults, or with what the command was last given.

    Raises:
        ValueError: not even NF4 fits the budget.
    """
    if precision.kind != "auto":
        return precision
    file = kept_file(model, precision.double_quant)
    if not file.is_file():
        say(f"precision=auto: measuring each layer of {model.path} once, for {file}")
        size = Sampling(steps=4)
        found = sensitivities(Sensitivity(model, sampling=size, double_quant=precision.double_quant), device, say)
        replace_file(file, lambda path: path.write_text(json.dumps(found) + "\n"))
    assert precision.budget_gib is not None
    mixture = choose(json.loads(file.read_text()), int(precision.budget_gib * 2**30), "precision.budget_gib")
    say(f"precision=auto: {mixture.describe()}")
    return replace(precision, kind="nf4", budget_gib=None, layers=mixture.layers())
