"""A checkpoint's adapter, written as the one to use: runs/<run>/chosen."""

from __future__ import annotations

import json
from pathlib import Path

from infer.adapter.lora import Adapter
from infer.adapter.model_card import Card, write_card
from infer.adapter.read import FILE
from infer.adapter.write import write_own
from infer.checkpoint.family import pipeline_of
from infer.choosing.run import RunFiles, read_checkpoint
from infer.program.atomic import replace_file


def best_of(files: RunFiles) -> tuple[str, str | None]:
    """The checkpoint that the last choice marked, and why.

    Raises:
        ValueError: no choice was made, or that checkpoint is gone.
    """
    file = files.folder / "choose" / "choice.json"
    try:
        best = json.loads(file.read_bytes())["best"]
        name, reason, weight = str(best["name"]), str(best["reason"]), float(best["weight"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"take is best, but {file} says none; run infer/choose.py without take first") from error
    if name not in files.checkpoints:
        raise ValueError(
            f"the best was {name}, which the run has not kept; choose again among {', '.join(files.checkpoints)}"
        )
    if weight != 1:  # the file holds the checkpoint at strength 1, whatever it was drawn at
        reason += f"; drawn at strength {weight:g}: use it with adapter.weight={weight:g}"
    return name, reason


def write_taken(files: RunFiles, name: str, reason: str | None) -> Path:
    """Write a checkpoint's adapter with notes and card; returns its file.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    adapter, step = read_checkpoint(files, name), files.checkpoints[name]
    folder = files.folder / "chosen"
    loss = files.loss_at(step)
    notes = {
        "step": step,
        "adapter": files.adapter,
        "trigger": files.trigger,
        "chosen": name,
        "validation": {} if loss is None else {str(step): loss},
    }
    settings = Adapter(**files.adapter)
    card = Card(
        name=files.folder.name,
        base=files.model.path,
        pipeline=pipeline_of(files.model),
        trigger=files.trigger,
        precision=files.precision.kind,
        facts={
            "kind": f"{settings.words()}, layers {settings.targets}",
            "steps": f"{step}, chosen among the run's checkpoints",
        },
        figures={} if loss is None else {str(step): loss},
        kind=settings.kind,
        place=str(folder),
    )
    write_card(folder, card)
    file = write_own(adapter, folder / FILE, notes)
    said = json.dumps({"name": name, "step": step, "reason": reason}, ensure_ascii=False)
    replace_file(folder / "choice.json", lambda path: path.write_text(said, encoding="utf-8"))
    return file
