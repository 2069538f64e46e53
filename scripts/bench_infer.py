"""Sampling at full size: seconds and peak memory of a picture with random weights, FLUX.1-dev's against the guide's.

    python scripts/bench_infer.py                       # every variant; a table, and one JSON line a row
    python scripts/bench_infer.py --only nf4 guide-nf4

1024x1024, 512 text tokens, text encoders at the transformer's precision; 50 steps of FLUX.1-dev, 4 of distilled
klein. A picture is denoising and decoding, after one that warms up. The guide is "Quantize Your Diffusion Models with
diffusers" (Hugging Face): its FluxPipeline with all parts on the device, products in fp16, nothing compiled.
"""

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from diffusers import FluxPipeline
from torch import nn

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import random_part
from infer.checkpoint.text import load_text_parts
from infer.device import allocator
from infer.device.device import release
from infer.device.measure import measure as measured
from infer.family.family import Text
from infer.fast.cuda_graph import Sampler
from infer.fast.install import Memory, choose_path, hold_of
from infer.quantize.precision import Precision
from infer.sample.encode import decode, text_encoder
from infer.sample.generate import Sampling, draw
from scripts import bench_rows
from scripts.bench_gang import alone
from scripts.bench_rows import Row, make_row

GIB = 2**30
SIZE = 1024, 1024
PROMPT = "a photo of a red fox in deep snow, late light"
DEV = "FLUX.1-dev"
STEPS = {DEV: 50, "FLUX.2-klein-4B": 4, "FLUX.2-klein-9B": 4}
GUIDANCE = {DEV: 3.5, "FLUX.2-klein-4B": 1.0, "FLUX.2-klein-9B": 1.0}
SIZES = {DEV: 1.0, "FLUX.2-klein-4B": 0.5, "FLUX.2-klein-9B": 1.0}  # of FLUX.1-dev's memory, text encoders included


@dataclass
class Variant:
    """One way to draw a picture."""

    precision: Precision
    guide: bool = False
    adapted: bool = False
    budget_gib: float | None = None
    steps: int = 50
    """That are drawn; seconds are for those of a picture."""
    model: str = DEV
    stepwise: bool = False
    """Modulations step by step, and not all before the first: for what that saves."""


VARIANTS = {
    "guide-nf4": Variant(Precision("nf4", compute_dtype="fp16"), guide=True),
    "guide-int8": Variant(Precision("int8", compute_dtype="fp16", llm_int8=True), guide=True, steps=10),
    "nf4": Variant(Precision("nf4")),
    "nf4-stepwise": Variant(Precision("nf4"), stepwise=True),
    "nf4-adapter": Variant(Precision("nf4"), adapted=True),
    "nf4-fp8": Variant(Precision("nf4", products="fp8")),
    "nf4-fp8-adapter": Variant(Precision("nf4", products="fp8"), adapted=True),
    "int8": Variant(Precision("int8")),
    "int8-adapter": Variant(Precision("int8"), adapted=True),
    "bf16": Variant(Precision("bf16")),
    "bf16-stepwise": Variant(Precision("bf16"), stepwise=True),
    "nf4-8gib": Variant(Precision("nf4"), budget_gib=8.0),
    "nf4-6gib": Variant(Precision("nf4"), budget_gib=6.0),
    **{
        f"{name}-{kind}": Variant(precision, adapted=kind.endswith("adapter"), steps=4, model=model)
        for name, model in (("klein4b", "FLUX.2-klein-4B"), ("klein9b", "FLUX.2-klein-9B"))
        for kind, precision in (
            ("nf4", Precision("nf4")),
            ("nf4-adapter", Precision("nf4")),
            ("nf4-fp8", Precision("nf4", products="fp8")),
            ("bf16", Precision("bf16")),
        )
    },
}
SECONDS = {"klein4b-nf4": "<= 0.35"}
FASTER = [
    ("nf4", "guide-nf4", ">= 1.4"),
    ("int8", "guide-int8", ">= 2.8"),
    ("nf4", "nf4-stepwise", ">= 1.01"),
    ("bf16", "bf16-stepwise", ">= 1.01"),
]
SLOWER = [
    ("nf4-fp8", "nf4", "<= 0.77"),
    ("nf4-fp8-adapter", "nf4-fp8", "<= 1.03"),
    ("nf4-adapter", "nf4", "<= 1.03"),
    ("int8-adapter", "int8", "<= 1.03"),
    *((f"{name}-nf4-adapter", f"{name}-nf4", "<= 1.05") for name in ("klein4b", "klein9b")),
]
MEMORY = {"nf4-8gib": "<= 8.0", "nf4-6gib": "<= 6.0"}


def model(variant: Variant) -> Model:
    return Model(f"black-forest-labs/{variant.model}", weights="random")


def measure_guide(variant: Variant, device: torch.device, gang: Path | None) -> Row:
    # as plain diffusers does: products and the residual stream in fp16
    own = model(variant)
    transformer = random_part(own.path, "transformer", variant.precision, device).eval().requires_grad_(False)
    vae = nn.Module.to(load_vae(own, device), torch.float16)
    for module in vae.modules():
        vars(module).pop("forward", None)  # diffusers' and torch's own
    parts = load_text_parts(own, variant.precision, device)
    pipeline = FluxPipeline(scheduler=load_scheduler(own), transformer=transformer, vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    t5, pooled, _ = pipeline.encode_prompt(PROMPT, None, max_sequence_length=512)
    inputs: dict[str, Any] = {"prompt_embeds": t5.half(), "pooled_prompt_embeds": pooled.half(), "output_type": "pil"}
    inputs |= {"height": SIZE[0], "width": SIZE[1], "guidance_scale": 3.5}
    pipeline(num_inference_steps=2, **inputs)
    with alone(gang), measured(device) as found:
        pipeline(num_inference_steps=variant.steps, generator=torch.Generator().manual_seed(0), **inputs)
    return seen(found, variant)


def seen(found: Any, variant: Variant, **more: Any) -> Row:
    """Seconds are for a picture's steps, whatever was drawn."""
    return {
        "seconds": found.seconds * STEPS[variant.model] / variant.steps,
        "steps": variant.steps,
        "allocated_gib": found.peak_memory_bytes / GIB,
        "reserved_gib": found.peak_reserved_bytes / GIB,
        **more,
    }


def measure_ours(variant: Variant, device: torch.device, gang: Path | None) -> Row:
    own = model(variant)
    with text_encoder(own, variant.precision, device, None) as encoder:
        text: Text = encoder([PROMPT])[0]
    more: Row = {"text_reserved_gib": allocator.peak_reserved(device) / GIB}
    memory = Memory(budget_gib=variant.budget_gib)
    transformer = load_transformer(own, variant.precision, device, hold_of(memory))
    if variant.adapted:
        for parameter in attach(transformer, Adapter(), 0):
            parameter.requires_grad_(False).add_(0.001)
    vae, scheduler = load_vae(own, device), load_scheduler(own)
    memory, stream = choose_path(transformer, memory, variant.precision, device, print)
    if variant.stepwise:
        transformer.precomputed = None

    def picture(steps: int) -> Any:
        latents = draw(transformer, scheduler, text, 0, Sampling(steps, GUIDANCE[variant.model]), SIZE, device)
        decode(vae, latents, *SIZE)
        return latents

    start = time.perf_counter()
    if memory.graphs(device):
        Sampler(transformer, stream)
    if stream is not None:
        assert variant.budget_gib is not None
        more["resident_blocks"] = stream.fit(variant.budget_gib, lambda: picture(1))
        more["host_gib"] = stream.host_bytes / GIB
    picture(2)
    latents = picture(2)
    more["digest"] = hashlib.sha256(latents.float().cpu().numpy().tobytes()).hexdigest()
    more["warm_up_seconds"] = time.perf_counter() - start
    with alone(gang), measured(device) as found:
        picture(variant.steps)
    return seen(found, variant, **more)


def measure(variant: Variant, device: torch.device, gang: Path | None = None) -> Row:
    release(device)
    return (measure_guide if variant.guide else measure_ours)(variant, device, gang)


def need(name: str) -> float:
    """GiB that a variant may take."""
    variant = VARIANTS[name]
    if variant.budget_gib is not None:
        return variant.budget_gib + 8  # T5, before the budget counts
    return {"nf4": 15.0, "int8": 21.0, "bf16": 36.0}[variant.precision.kind] * SIZES[variant.model] + (
        4.0 if variant.guide else 0.0
    )


def worker(names: list[str], out: Path, gang: Path | None) -> None:
    device = torch.device("cuda")
    for name in names:
        if not bench_rows.attempt(name, out, device, lambda name=name: measure(VARIANTS[name], device, gang)):  # type: ignore[misc]
            sys.exit(1)


def rows_of(results: dict[str, Row]) -> list[Row]:
    """What was measured, against what was to be reached."""
    rows = []
    for name, found in results.items():
        if "error" in found:
            rows.append(make_row(f"sample {name}", "s", None, SECONDS.get(name), found, error=found["error"]))
            continue
        own = {key: value for key, value in found.items() if key not in ("card", "date", "versions", "command")}
        rows.append(make_row(f"sample {name}", "s", found["seconds"], SECONDS.get(name), found, seen=own))
        peaks = f"sample {name}, peak allocated", f"sample {name}, peak reserved"
        rows.append(make_row(peaks[0], "GiB", found["allocated_gib"], MEMORY.get(name), found))
        rows.append(make_row(peaks[1], "GiB", found["reserved_gib"], MEMORY.get(name), found))
    good = {name: found for name, found in results.items() if "error" not in found}
    for name, other, target in FASTER + SLOWER:
        if name in good and other in good:
            a, b = good[name]["seconds"], good[other]["seconds"]
            faster = target.startswith(">=")
            label = f"sample {name}: {'faster' if faster else 'slower'} than {other}"
            rows.append(make_row(label, "x", b / a if faster else a / b, target, good[name]))
    for name in MEMORY:
        if name in good and "nf4" in good:
            same = float(good[name]["digest"] == good["nf4"]["digest"])
            rows.append(make_row(f"sample {name}: equal to resident bit for bit", "", same, ">= 1", good[name]))
    return rows


if __name__ == "__main__":
    names = list(VARIANTS)
    bench_rows.command(
        Path(__file__), __doc__ or "", names, lambda each: [[name] for name in each], worker, rows_of, need
    )
