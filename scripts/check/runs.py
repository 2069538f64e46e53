"""Trainings and comparisons of the check, and what they left behind."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from infer.adapter.selection import Trained
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling
from scripts.check.case import MIDDLE, PROMPTS
from train.run.config import Train
from train.train import train


def losses(run: str) -> list[float]:
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def scores(run: str) -> dict[int, dict[str, float]]:
    """What was scored while it trained, by step."""
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "score_drift" in line}


def learned(run: str) -> dict[str, Tensor]:
    return load_file(Path("runs", run, "adapter", "pytorch_lora_weights.safetensors"))


def preview(run: str, step: int) -> Image.Image:
    return Image.open(Path("runs", run, "previews", f"step-{step:06d}.png"))


def resumed(job: Train) -> float:
    """The same training taken up again in its middle: the largest difference of any value."""
    straight = learned(job.run)
    train(replace(job, resume=f"step-{MIDDLE:06d}", previews=[], precision=replace(job.precision)))
    again = learned(job.run)
    return max(float((straight[key].double() - again[key].double()).abs().max()) for key in straight)


def pictures(run: str, model: Model, precision: Precision, memory: Memory, device: torch.device,
             adapter: str | None, recovery: str | None = None) -> list[Image.Image]:  # fmt: skip
    """A comparison's pictures, of the base and of the adapter."""
    folder = compare(
        Compare(
            model,
            {"own": replace(precision)},
            adapter=Trained(adapter),
            recovery={} if recovery is None else {"own": recovery},
            prompts=PROMPTS,
            sampling=Sampling(steps=4),
            memory=memory,
            run=run,
            device=device.type,
        )
    )
    return opened(folder)


def pictures_of(run: str) -> list[Image.Image]:
    """Those that a comparison left."""
    return opened(Path("runs", run, "compare"))


def opened(folder: Path) -> list[Image.Image]:
    """The pictures of a comparison's folder."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [Image.open(folder / row["image"]).convert("RGB") for row in rows]
