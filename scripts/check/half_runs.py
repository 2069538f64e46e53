"""Short trainings and pictures of the bundled model in fp16 and bf16, against fp32."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_scheduler, load_transformer
from infer.checkpoint.model import Model
from infer.fast.install import Memory, choose_path
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling, draw
from scripts.bench_rows import append
from scripts.check.half_gradients import FP16, relative
from scripts.check.no_bf16 import NoBf16, forbidden
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.loop import run as training
from train.objective.optim import Optim
from train.run.config import Train
from train.train import train


def bundled(row: Callable[..., None], device: torch.device, steps: int, curves: Path) -> None:
    """Losses by step of real runs in each precision, each added to the file `curves`; and the pictures of both."""
    folder = Path("runs/check-half-pictures")
    if not (folder / "metadata.jsonl").is_file():
        make_style(folder, 36, 0)
    model, series, pictures = Model(str(ROOT / "scripts" / "tiny" / "model")), {}, {}
    memory = Memory(compile=False if device.type == "cuda" else None, graph=False if device.type == "cuda" else None)
    fit = training.fit

    def watched(*args: Any, **kwargs: Any) -> Any:
        with NoBf16():
            return fit(*args, **kwargs)

    for name, precision in (("fp32", Precision("nf4", "fp32")), ("bf16", Precision("nf4")), ("fp16", FP16)):
        half = name == "fp16"
        training.fit = watched if half else fit
        with forbidden() if half else nullcontext():
            job = Train(
                model=model,
                precision=precision,
                adapter=Adapter(rank=8, alpha=8.0),
                data=Data(path=str(folder), resolution=128, batch_size=4, cache=f"runs/check-half-cache-{name}"),
                optim=Optim(lr=1e-3),
                memory=Memory(compile=False if device.type == "cuda" else None),
                steps=steps,
                validate_every=0,
                save_every=0,
                run=f"check-half-{name}",
                previews=[],
                device=device.type,
            )
            train(job)
            lines = [json.loads(line) for line in Path("runs", job.run, "metrics.jsonl").read_text().splitlines()]
            series[name] = torch.tensor([line["loss"] for line in lines if "loss" in line])
            assert len(series[name]) == steps and series[name].isfinite().all()
            curve = {
                "precision": name,
                "losses": series[name].tolist(),
                "validation": {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line},
            }
            append(curves, curve)
            print(name, curve["validation"], flush=True)
            with text_encoder(model, precision, device, None) as encoder:
                (text,) = encoder(["a red star"])
            transformer = load_transformer(model, precision, device)
            choose_path(transformer, memory, precision, device, print)
            with NoBf16() if half else nullcontext():
                latents = draw(transformer, load_scheduler(model), text, 0, Sampling(20, 3.5), (128, 128), device)
            assert latents.isfinite().all()
            pictures[name] = latents.float().cpu()
        if name != "fp32":
            apart = distance(series[name], series["fp32"])
            row(f"loss curve of {steps} steps, {name}, mean distance from fp32", "", apart, "<= 0.02")
            apart = relative([pictures[name]], [pictures["fp32"]])
            row(f"latents after 20 steps of drawing, {name} against fp32", "", apart, "<= 0.1")
    training.fit = fit
    apart = distance(series["fp16"], series["bf16"])
    row(f"loss curve of {steps} steps, fp16, mean distance from bf16", "", apart, "<= 0.02")


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over the steps of how far one curve is from the other, as a part of the other."""
    return float(((one - other).abs() / other).mean())
