"""A checkpoint's adapter, written as the one to use: runs/<run>/chosen."""

from __future__ import annotations

import json
from pathlib import Path

from infer.adapter.lora import Adapter
from infer.adapter.model_card import Card, write_card
from infer.adapter.read import FILE, read_whole
from infer.adapter.write import write_own
from infer.checkpoint.family import pipeline_of
from infer.choosing.run import RESULT, RunFiles, checkpoint_file, known_settings, read_run
from infer.program.atomic import replace_file


def best_of(files: RunFiles, average: bool | None) -> tuple[str, str, RunFiles]:
    """The checkpoint that the last choice marked, why, and the run's files with the weights that it drew; average:
    which ones are asked for.

    Raises:
        ValueError: no choice was made, that checkpoint is gone, or it drew other weights than are asked for.
    """
    file = files.folder / "choose" / RESULT
    try:
        said = json.loads(file.read_bytes())
        best, drawn = said["best"], bool(said.get("average", False))  # older versions drew the weights alone
        name, reason, weight = str(best["name"]), str(best["reason"]), float(best["weight"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"take is best, but {file} says none; run infer/choose.py without take first") from error
    if name not in files.checkpoints:
        raise ValueError(
            f"the best was {name}, which the run has not kept; choose again among {', '.join(files.checkpoints)}"
        )
    if average not in (None, drawn):
        what = f"average={str(average).lower()}"
        raise ValueError(f"take is best and {what}, but the last choice drew the others; choose again with {what}")
    if weight != 1:  # the file holds the checkpoint at strength 1, whatever it was drawn at
        reason += f"; drawn at strength {weight:g}: use it with adapter.weight={weight:g}"
    return name, reason, read_run(files.folder, list(files.checkpoints), drawn)


def write_taken(files: RunFiles, name: str, reason: str | None) -> Path:
    """Write a checkpoint's adapter with notes and card; returns its file.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    adapter, step = read_whole(str(checkpoint_file(files, name))), files.checkpoints[name]
    folder = files.folder / "chosen"
    loss = files.loss_at(step)
    notes = {
        "step": step,
        "adapter": files.adapter,
        "trigger": files.trigger,
        "chosen": name,
        "averaged": files.average,
        "validation": {} if loss is None else {str(step): loss},
    }
    settings = known_settings(Adapter, files.adapter)
    card = Card(
        name=files.folder.name,
        base=files.model.path,
        pipeline=pipeline_of(files.model),
        trigger=files.trigger,
        precision=files.precision.kind,
        facts={
            "kind": f"{settings.words()}, layers {settings.targets}",
            "steps": f"{step}, chosen among the run's checkpoints" + (", averaged weights" * files.average),
        },
        figures={} if loss is None else {str(step): loss},
        kind=settings.kind,
        place=str(folder),
    )
    write_card(folder, card)
    file = write_own(adapter, folder / FILE, notes)
    said = json.dumps({"name": name, "step": step, "reason": reason, "average": files.average}, ensure_ascii=False)
    replace_file(folder / RESULT, lambda path: path.write_text(said, encoding="utf-8"))
    return file
