"""The velocity's error when each group of layers alone is quantized, measured, and kept for precision=auto."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from infer.checkpoint.load import Model, fingerprint, load_scheduler, load_transformer, own_size
from infer.device.device import release
from infer.fast.install import choose_path
from infer.fast.memory import Memory
from infer.fast.weights import groups
from infer.program.atomic import replace_file
from infer.quantize.precision import Precision, linear_layers, stored_bytes
from infer.rounding.budget import HEADER, Mixture, choose, layer_bytes
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling, draw, mend_of
from infer.sensitivity import Sensitivity

KEPT = Path("runs/cache")
KINDS = ("nf4", "int8")
Inputs = list[dict[str, Tensor]]


def inputs_of(
    transformer: FluxTransformer2DModel, options: Sensitivity, size: tuple[int, int], device: torch.device
) -> Inputs:
    """What the transformer is given while it draws the prompts: one batch a step, in the order of the steps."""
    with text_encoder(options.model, Precision("bf16"), device, None) as encoder:
        texts = encoder(options.prompts)
    seen: list[dict[str, Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({key: value.clone() for key, value in kwargs.items() if isinstance(value, Tensor)})

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    scheduler = load_scheduler(options.model)
    for seed, text in enumerate(texts):
        draw(transformer, scheduler, text, seed, options.sampling, size, device)
    hook.remove()
    steps = options.sampling.steps
    together = []
    for step in range(steps):
        own = seen[step::steps]
        shared = {key: value for key, value in own[0].items() if key.endswith("_ids")}
        apart = {key: torch.cat([one[key] for one in own]) for key in own[0] if key not in shared}
        together.append(apart | shared)
    return together


def velocities(transformer: Any, inputs: Inputs) -> Tensor:
    """[samples, tokens, channels * 4] for all inputs, in fp32.

    Raises:
        ValueError: one is not finite.
    """
    with torch.no_grad():
        found = torch.cat([transformer(**batch, return_dict=False)[0].float() for batch in inputs])
    if not found.isfinite().all():
        raise ValueError(f"the transformer's output is not finite; {mend_of(transformer)}")
    return found


def quantized_values(weight: Tensor, kind: str, double_quant: bool) -> Tensor:
    """The values [out, in] that take part in products once a weight is stored as int8, fp4 or nf4, in its own dtype."""
    import bitsandbytes.functional as bnb

    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        values: Tensor = (codes.float() * (scales / 127.0)[:, None]).to(weight.dtype)
        return values
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type=kind
    )
    values = bnb.dequantize_4bit(packed, state).to(weight.dtype)
    return values


def measure(
    transformer: FluxTransformer2DModel, inputs: Inputs, double_quant: bool, tick: Callable[[], object]
) -> list[dict[str, Any]]:
    """For each group of layers that read one input: its `layers`, and by kind the `errors` (the mean over samples of
    the squared relative error of the velocity when it alone is of that kind) and the `bytes` that it takes."""
    layers = linear_layers(transformer)
    exact = velocities(transformer, inputs)
    norms = exact.flatten(1).square().sum(1)
    found = []
    for names in groups(layers):
        errors = {"bf16": 0.0}
        own = [layers[name].weight for name in names]
        for kind in KINDS:
            kept = [weight.data.clone() for weight in own]
            for weight in own:
                # in place: what the fast path has stacked are views of these
                weight.data.copy_(quantized_values(weight.data, kind, double_quant))
            off = (velocities(transformer, inputs) - exact).flatten(1).square().sum(1)
            errors[kind] = float((off / norms).mean())
            for weight, data in zip(own, kept, strict=True):
                weight.data.copy_(data)
            tick()
        sizes = {kind: sum(layer_bytes(layers[name], kind, double_quant) for name in names) for kind in errors}
        found.append({"layers": names, "errors": errors, "bytes": sizes})
    return found


def sensitivities(options: Sensitivity, device: torch.device, say: Callable[[str], object]) -> dict[str, Any]:
    """`groups` of layers with their errors (see `measure`), and the transformer's `other_bytes`: what is no weight of a
    linear layer."""
    side = min(512, own_size(options.model))
    size = options.sampling.height or side, options.sampling.width or side
    precision = Precision("bf16")
    transformer = load_transformer(options.model, precision, device)
    choose_path(transformer, Memory(keep="everything", compile=False, graph=False), precision, device, say)
    layers = linear_layers(transformer)
    other = stored_bytes(transformer) - sum(layer_bytes(layer, "bf16", False) for layer in layers.values())
    inputs = inputs_of(transformer, options, size, device)
    with tqdm(total=len(groups(layers)) * len(KINDS), unit="layer", desc="sensitivity") as bar:
        found = measure(transformer, inputs, options.double_quant, bar.update)
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


def write_precision(mixture: Mixture, double_quant: bool, file: Path) -> None:
    """A precision's YAML, all fields said."""
    precision = Precision("nf4", double_quant=double_quant, layers=mixture.layers())
    text = f"{HEADER}: {mixture.describe()}\n" + yaml.safe_dump(asdict(precision), sort_keys=False)
    replace_file(file, lambda path: path.write_text(text))
