"""Whole commands on the GPU: merging, optimizers, several resolutions, and programs of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.model import Model
from infer.merge import merge
from infer.merging.settings import Merge
from infer.program.paths import ROOT
from infer.sample.generate import Sampling
from scripts.check.bounds import on_cpu
from scripts.check.case import LORA, MIDDLE, NF4, PATHS, PROMPTS, STEPS, Case, training
from scripts.check.figures import LEARNED, LOSS, PICTURE, Figures, apart, nearness
from scripts.check.runs import learned, losses, pictures, resumed, scores
from train.objective.optim import Optim
from train.train import train


def check_merge(model: str, device: torch.device) -> Figures:
    """Merged on the GPU and on a CPU; then drawn on each path from the quantized files."""
    name, checkpoint = f"{model}merged", Case("nf4", "plain", "lora", model).checkpoint
    job = training(f"{name}-adapter", LORA, device, previews=[], model=checkpoint)
    train(job)
    adapter = Trained(f"runs/{job.run}/adapter")
    stored = []
    for where in dict.fromkeys([device.type, "cpu"]):
        out = Path(f"{name}-{where}")
        merge(Merge(checkpoint, NF4, adapter, str(out), PROMPTS, Sampling(steps=2), device=where))
        files = sorted((out / "transformer").glob("*.safetensors"))
        stored.append({key: value for file in files for key, value in load_file(file).items()})
    there = stored[-1]
    differ = sum(int((a.view(torch.uint8) != there[key].view(torch.uint8)).sum()) for key, a in stored[0].items())
    total = sum(value.numel() * value.element_size() for value in there.values())
    figures: Figures = {"bytes that differ from a CPU's": (differ / total, "<=", 1e-3)}
    drawn = {}
    for path, memory in PATHS.items():
        if memory.budget_gib is None or device.type == "cuda":
            memory = Case("nf4", path, "lora").memory(device)
            drawn[path] = pictures(f"{name}-{path}", Model(f"{name}-{device.type}"), NF4, memory, device, None)
    for path in list(drawn)[1:]:
        figures[f"{path} pictures against the plain path's, dB"] = nearness(drawn[path], drawn["plain"]), ">=", PICTURE
    return figures


def check_optimizer(name: str, device: torch.device) -> Figures:
    """A training with an optimizer, resumed; against a CPU's, or for paged states against those that are not."""
    optim = Optim(name, lr=1.0 if name == "prodigy" else 1e-3)
    job = training(f"optimizer-{name}", LORA, device, optim=optim, previews=[])
    train(job)
    other = "optimizer-adamw8bit"
    if name != "paged_adamw8bit":
        other = f"optimizer-{name}-cpu"
        with on_cpu():
            train(training(other, LORA, torch.device("cpu"), optim=optim, previews=[]))
    figures: Figures = {"learned against a CPU's": (apart(learned(job.run), learned(other)), "<=", 2 * LEARNED)}
    figures["resumed, largest difference"] = resumed(job), "<=", 0.0
    return figures


def check_kind(kind: str, device: torch.device) -> Figures:
    """An adapter that is no LoRA: trained, resumed and drawn, against a CPU's."""
    adapter, rate = Adapter(16, kind=kind, factor=8 if kind == "lokr" else 16), {"lokr": 1e-2, "oft": 1e-3}
    job = training(f"kind-{kind}", adapter, device, optim=Optim(lr=rate.get(kind, 3e-3)), previews=[])
    train(job)
    figures: Figures = {"resumed, largest difference": (resumed(job), "<=", 0.0)}
    other = f"kind-{kind}-cpu"
    with on_cpu():
        train(training(other, adapter, torch.device("cpu"), optim=job.optim, previews=[]))
    # at LoKr's rate the first steps, whose size is Adam's whatever the gradient's, are most of what so few learn
    limit = (3 if kind == "lokr" else 2) * LEARNED
    figures["learned against a CPU's"] = apart(learned(job.run), learned(other)), "<=", limit
    trained, drawn = f"runs/{job.run}/adapter", []
    for where in (device, torch.device("cpu")):
        memory = Case("nf4", "fused", "lora").memory(where)
        drawn.append(pictures(f"kind-{kind}-{where.type}-pictures", job.model, NF4, memory, where, trained))
    figures["pictures against a CPU's, dB"] = nearness(*drawn), ">=", PICTURE
    return figures


def check_scores(path: str, device: torch.device) -> Figures:
    """A training that draws and scores in its middle, against the same without, and its scores against a CPU's."""
    scored: dict[str, Any] = {"scores_every": MIDDLE, "unrelated": ["three blue hearts on a cream background"]}
    memory = Case("nf4", path, "lora").memory(device)
    job = training(f"scores-{path}", LORA, device, memory=memory, **scored)
    train(job)
    train(training(f"scores-{path}-none", LORA, device, memory=memory, previews=[]))
    figures: Figures = {
        "learned against no scoring's": (apart(learned(job.run), learned(f"{job.run}-none")), "<=", 0.0)
    }
    with on_cpu():
        train(training(f"{job.run}-cpu", LORA, torch.device("cpu"), **scored))
    found, expected = scores(job.run), scores(f"{job.run}-cpu")
    assert found.keys() == expected.keys() == {MIDDLE, STEPS}, f"steps {list(found)} were scored"
    for name in ("score_change", "score_drift"):
        off = max(abs(found[step][name] / expected[step][name] - 1) for step in expected)
        figures[f"{name} against a CPU's"] = off, "<=", 2 * LEARNED
    return figures


def check_resolutions(model: str, device: torch.device) -> Figures:
    """Pictures of three sizes in one training."""
    runs = {}
    for path in ("plain", "fused"):
        case = Case("nf4", path, "lora", model)
        how = NF4, case.memory(device), [128, 96, 160]
        runs[path] = f"{model}resolutions-{path}"
        train(training(runs[path], LORA, device, *how, steps=12, previews=[], model=case.checkpoint))
    a, b = (losses(runs[path]) for path in ("fused", "plain"))
    return {"loss against the plain path's": (max(abs(x - y) / y for x, y in zip(a, b, strict=True)), "<=", LOSS)}


def outside(command: list[str], device: torch.device) -> Figures:
    """A program of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return {"exit code": (float(code), "<=", 0.0)}


def gpu_tests() -> list[str]:
    """pytest's own, of the files that hold any."""
    mark = 'reason="needs a GPU"'
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if mark in file.read_text())
    return [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", *files]
