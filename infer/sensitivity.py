"""Which layers suffer from quantization: the velocity's error when each alone is quantized, and the mixture of kinds
that a budget of bytes buys.

    python infer/sensitivity.py model=dev budget_gib=8 out=configs/precision/mine.yaml
    python infer/compare.py model=dev +precision@precisions.mine=mine 'only=[bf16,nf4,mine]'

One bf16 transformer draws a few prompts; at the latents that it comes by, each group of layers that read one input has
its weights replaced by their quantized values and put back. Needs no data and no network but FLUX itself. Writes
sensitivity.json and sensitivity.png to runs/<run>/; precision=auto does the same where no measurement is kept yet.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.quiet import quieten

    quieten()

import yaml
from diffusers import FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from infer.atomic import replace_file
from infer.bounds import GIB, check_most
from infer.command import check_run_name, pick_device, run_command
from infer.encode import release, text_encoder
from infer.fast import Memory, choose_path
from infer.flux import Model, check_model, fingerprint, load_scheduler, load_transformer, own_size
from infer.generate import Sampling, draw, mend_of
from infer.heat import draw_heat
from infer.mixture import Mixture, choose, layer_bytes
from infer.quantize import Precision, linear_layers, stored_bytes
from infer.report import aligned
from infer.stack import groups

KEPT = Path("runs/cache")
KINDS = ("nf4", "int8")
PROMPTS = (
    "a large red star in the middle on a sky background",
    "two blue circles on a cream background",
    "a photo of a cat on a wooden table",
    "a portrait of an old man, oil painting",
)
Inputs = list[dict[str, Tensor]]


@dataclass
class Sensitivity:
    """What to measure, and what to make of it."""

    model: Model = field(default_factory=Model)
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    """What is drawn to come by latents; the prompt's place in the list is its seed."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=4))
    """Latents of every step are measured at; null sizes take the checkpoint's own, at most 512."""
    double_quant: bool = False
    """Quantize the absmax of 4-bit layers too."""
    budget_gib: float | None = None
    """Bytes of the transformer that the mixture may take; null proposes none."""
    out: str | None = None
    """A YAML file for the mixture, as one of configs/precision; null writes none."""
    run: str = "sensitivity"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_most(self, "", budget_gib=GIB)
        if not self.prompts:
            raise ValueError("prompts is empty; give at least one, as in 'prompts=[a red star]'")
        if self.out is not None and self.budget_gib is None:
            raise ValueError(f"out is {self.out!r}, but budget_gib is null; say how many bytes the mixture may take")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"budget_gib is {self.budget_gib}; it must be above 0, or null")


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


HEADER = "# python infer/sensitivity.py"


def write_precision(mixture: Mixture, double_quant: bool, file: Path) -> None:
    """A precision's YAML, all fields said."""
    precision = Precision("nf4", double_quant=double_quant, layers=mixture.layers())
    text = f"{HEADER}: {mixture.describe()}\n" + yaml.safe_dump(asdict(precision), sort_keys=False)
    replace_file(file, lambda path: path.write_text(text))


def sensitivity(options: Sensitivity) -> Path:
    """Measure, keep, propose; returns the JSON file."""
    folder = check_run_name(options.run)
    device = pick_device(options.device)
    check_model(options.model)
    there = Path(options.out) if options.out is not None and Path(options.out).exists() else None
    if there is not None and not (there.is_file() and HEADER in there.read_text(errors="replace")):
        raise ValueError(f"out is {options.out!r}, which is there and not of this command; give another file")
    found = sensitivities(options, device, print)
    content = json.dumps(found, indent=1) + "\n"
    for file in (kept_file(options.model, options.double_quant), folder / "sensitivity.json"):
        replace_file(file, lambda path: path.write_text(content))
    replace_file(folder / "sensitivity.png", lambda path: draw_heat(found["groups"], path))
    worst = sorted(found["groups"], key=lambda group: -group["errors"]["nf4"])[:12]
    lines = [["layers", "error % nf4", "int8", "KiB nf4"]]
    for group in worst:
        name = group["layers"][0] + "".join(f", {other.rpartition('.')[2]}" for other in group["layers"][1:])
        shown = [f"{100 * group['errors'][kind] ** 0.5:.3f}" for kind in KINDS]
        lines.append([name, *shown, f"{group['bytes']['nf4'] / 2**10:,.0f}"])
    print(f"the {len(worst)} of {len(found['groups'])} groups of layers that suffer most, each quantized alone:")
    print(aligned(lines, 1))
    if options.budget_gib is not None:
        mixture = choose(found, int(options.budget_gib * 2**30), "budget_gib")
        print(mixture.describe())
        if options.out is not None:
            write_precision(mixture, options.double_quant, Path(options.out))
            print(f"precision: {options.out}")
    print(f"figure: {folder / 'sensitivity.png'}")
    return folder / "sensitivity.json"


if __name__ == "__main__":
    run_command("sensitivity", Sensitivity, sensitivity)
