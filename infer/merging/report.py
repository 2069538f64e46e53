"""What is left of an update when it is merged and rounded: by layer, and in pictures."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer.adapter.selection import Trained, load_chosen
from infer.adapter.targets import base_layers
from infer.checkpoint.family import own_size
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.merging.update import Part, merged
from infer.quantize.layer import rounded
from infer.quantize.precision import Precision
from infer.quantize.storage import dequantized
from infer.sample.encode import decode, drawn_texts, text_encoder
from infer.sample.generate import Sampling, draw, settled
from infer.score.pairs import distance


@dataclass
class Kept:
    """Of one layer's update D = W' - W, where Q is what is stored of a weight."""

    layer: str
    update: float
    """||D|| / ||W||"""
    error: float
    """||Q(W') - W'|| / ||W'||: as large as without an adapter, since it is rounded once."""
    survives: float
    """<Q(W') - Q(W), D> / ||D||^2: the share of the update that its rounding keeps, on the average 1."""
    straight: float | None
    """The same for Q(Q(W) + D): merged straight into the quantized weights; None where nothing is quantized."""


def share(change: Tensor, update: Tensor) -> float:
    """How much of an update a change holds."""
    return float((change.double() * update.double()).sum() / update.double().square().sum().clamp_min(1e-300))


def kept_of(
    layer: str, weight: Tensor, exact: Tensor, kind: Precision | None, precision: Precision, device: torch.device
) -> Kept:
    """weight, exact [out, in] in fp32; `kind` None: the layer is not quantized but stored in the compute dtype."""
    stored = kind or Precision({torch.bfloat16: "bf16", torch.float32: "fp32"}[precision.dtype])
    before, after, update = rounded(weight, stored, device), rounded(exact, stored, device), exact - weight
    straight = None
    if kind is not None:
        straight = share(rounded(before + update, stored, device) - before, update)
    return Kept(
        layer,
        float(update.norm() / weight.norm()),
        float((after - exact).norm() / exact.norm()),
        share(after - before, update),
        straight,
    )


def straight_loss(transformer: Any, parts: dict[str, list[Part]], precision: Precision) -> float:
    """The share of the update that merging straight into quantized weights loses, the mean over at most 16 layers."""
    layers, lost = base_layers(transformer), []
    for name in list(parts)[:16]:
        stored = dequantized(layers[name]).cpu()
        exact = merged(stored, parts[name])
        change = rounded(exact, precision, layers[name].weight.device) - stored
        lost.append(1 - share(change, exact - stored))
    return sum(lost) / len(lost)


def compare_pictures(
    model: Model,
    out: str,
    precision: Precision,
    chosen: Trained,
    prompts: list[str],
    sampling: Sampling,
    seed: int,
    device: torch.device,
    folder: Path,
) -> list[dict[str, Any]]:
    """Draw each prompt with the adapters in bf16, with them at run time at the precision, and merged; PSNR and SSIM of
    the latter two against the first."""
    size = sampling.size(own_size(model))
    sampling = settled(sampling, model)
    with text_encoder(model, precision, device, None) as encoder:
        texts = drawn_texts(model, encoder, prompts)
    kinds = {"bf16": (model, Precision("bf16")), "run time": (model, precision), "merged": (Model(out), precision)}
    drawn: dict[tuple[str, int], Any] = {}
    vae = load_vae(model, device)
    for kind, (source, how) in kinds.items():
        transformer = load_transformer(source, how, device)
        if kind != "merged":
            load_chosen(transformer, chosen, model)
        for i, text in enumerate(texts):
            picture = decode(vae, draw(transformer, load_scheduler(model), text, seed, sampling, size, device), *size)
            picture.save(folder / f"merge-{i:03d}-{kind.replace(' ', '-')}.png")
            drawn[kind, i] = picture
        del transformer
        release(device)
    return [
        {"prompt": prompt, "kind": kind, **distance(drawn[kind, i], drawn["bf16", i])}
        for i, prompt in enumerate(prompts)
        for kind in ("run time", "merged")
    ]


def report(
    kept: list[Kept], pictures: list[dict[str, Any]], adapters: list[str], precision: Precision, folder: Path
) -> str:
    """Write merge.json and merge.md; returns a summary of some lines."""
    body = {"adapters": adapters, "precision": asdict(precision), "layers": [asdict(one) for one in kept]}
    (folder / "merge.json").write_text(json.dumps(body | {"pictures": pictures}, indent=2) + "\n")
    mean = {name: sum(getattr(one, name) for one in kept) / len(kept) for name in ("update", "error", "survives")}
    straight = [one.straight for one in kept if one.straight is not None]
    said = [
        f"{len(kept)} layers; the update is {100 * mean['update']:.2f} % of a weight, the rounding "
        f"{100 * mean['error']:.2f} %; {100 * mean['survives']:.1f} % of the update is in the stored weights"
    ]
    if straight:
        said.append(
            f"merged straight into {precision.kind} weights, {100 * sum(straight) / len(straight):.1f} % would be"
        )
    for kind in dict.fromkeys(one["kind"] for one in pictures):
        psnr = [one["psnr"] for one in pictures if one["kind"] == kind and one["psnr"] is not None]
        if psnr:
            said.append(f"pictures, {kind}: {sum(psnr) / len(psnr):.1f} dB from bf16 with the adapters")
    lines = ["# Merged: " + ", ".join(adapters), "", *[f"- {line}" for line in said], ""]
    lines += ["| layer | update % | error % | survives % | straight % |", "|---|---|---|---|---|"]
    for one in sorted(kept, key=lambda each: each.survives):
        last = "" if one.straight is None else f"{100 * one.straight:.1f}"
        row = f"{100 * one.update:.2f} | {100 * one.error:.2f} | {100 * one.survives:.1f}"
        lines.append(f"| {one.layer} | {row} | {last} |")
    (folder / "merge.md").write_text("\n".join(lines) + "\n")
    return "\n".join(said)
