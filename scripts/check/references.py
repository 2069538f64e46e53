"""Edit training: pictures with references, captured, launched, offloaded and plain."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infer.adapter.selection import Trained
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.sample.edit import Edit
from infer.sample.generate import Sampling
from scripts.check.case import LORA, NF4, STEPS, Case, training
from scripts.check.figures import LOSS, PICTURE, Figures, apart, decibels, nearness
from scripts.check.runs import learned, losses, opened, resumed
from scripts.tiny.make_edits import make_edits
from train.data.dataset import Data
from train.train import train

PATHS = ("plain", "fused", "launched", "streamed")


def check_references(model: str, device: torch.device) -> Figures:
    """Trained with one reference a picture, some of them dropped; drawn with none, one and two in one process."""
    folder = Path(f"{model}edits")
    make_edits(folder, 8, 2, 0)
    data = Data(
        str(folder / "after"),
        128,
        2,
        references=[str(folder / "before")],
        reference_dropout=0.3,
        teach_references=not model,
        validation=0.0,
        cache=f"{model}cache-references",
    )
    text = "make it a blue star"
    held = [str(folder / "held" / f"before-{i}.png") for i in range(2)]
    edits = [Edit(text, held[:count]) for count in (1, 2)]
    drawn, jobs = {}, {}
    for path in PATHS if device.type == "cuda" else PATHS[:2]:
        case = Case("nf4", "fused" if path == "launched" else path, "lora", model)
        memory = case.memory(device)
        memory.graph = memory.graph and path != "launched"
        run = f"{model}references-{path}"
        options: dict[str, Any] = {"data": replace(data), "model": case.checkpoint, "deterministic": bool(model)}
        jobs[path] = training(run, LORA, device, NF4, replace(memory), validation=0.0, previews=[], **options)
        train(jobs[path])
        pictures = Compare(
            case.checkpoint,
            {"own": replace(NF4)},
            adapter=Trained(f"runs/{jobs['plain'].run}/adapter"),
            prompts=[text],
            edits=edits,
            reference_resolution=128,
            sampling=Sampling(steps=2),
            memory=memory,
            run=f"{run}-pictures",
            device=device.type,
        )
        drawn[path] = opened(compare(pictures))
    figures: Figures = {"resumed, largest difference": (resumed(jobs["fused"]), "<=", 0.0)}
    runs = {path: job.run for path, job in jobs.items()}
    for path in PATHS[2:]:
        if path in runs:
            figures[f"{path}: learned against the captured"] = (
                apart(learned(runs[path]), learned(runs["fused"])),
                "<=",
                0,
            )
            figures[f"{path}: pictures against the captured, dB"] = nearness(drawn[path], drawn["fused"]), ">=", 99.0
    a, b = (losses(runs[path])[:STEPS] for path in ("fused", "plain"))
    figures["loss against the plain path's"] = max(abs(x - y) / y for x, y in zip(a, b, strict=True)), "<=", LOSS
    figures["pictures against the plain path's, dB"] = nearness(drawn["fused"], drawn["plain"]), ">=", PICTURE
    none, one, two = drawn["fused"][: len(edits) + 1]
    alike = max(decibels(a, b) for a, b in ((none, one), (one, two)))
    figures["pictures with fewer references, dB"] = alike, "<=", 60.0
    return figures
