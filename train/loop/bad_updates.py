"""Updates with a spike of the loss, or whose loss or gradient is not finite: which samples they had, and a dump.

`events.jsonl` gets a line for each spike and for each update that was left out because it was not finite. The latest
updates that were left out are dumped to `skipped/step-000123/`: report.json, the adapter as it was, and every rank's
batches, with tensors named as in train/loop/batch.py.
"""

import json
import math
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from infer.adapter.attached import adapter_state
from infer.program.atomic import replace_file
from train.loop.batch import draw_view_and_text, training_batch
from train.loop.session import Session
from train.objective.spikes import remember, threshold
from train.ranks.update import RankBatch, Update
from train.state.journal import Journal
from train.state.progress import Progress

DUMPS = 3  # how many of the latest are kept
NAMED = 32  # samples that an event names at most


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def _write(file: Path, content: bytes) -> None:
    replace_file(file, lambda path: path.write_bytes(content))


def describe(session: Session, update: Update) -> list[dict[str, Any]]:
    """The samples of an update, those that are not finite first, then by falling loss: name, text as drawn,
    epoch and position, noise level and loss."""
    job, cache, samples = session.job, session.data.cache, session.data.samples
    found = []
    ordered = sorted(update.losses, key=lambda one: one[1] if math.isfinite(one[1]) else math.inf, reverse=True)
    for index, loss, _ in ordered[:NAMED]:
        view, text = draw_view_and_text(job, cache, samples, index)
        sigma = training_batch(job, cache, samples, [index], 1.0, torch.device("cpu")).sigma
        found.append(
            {
                "sample": samples.all[index.sample].name,
                "text": text,
                "height": view.height,
                "width": view.width,
                "epoch": index.epoch,
                "position": index.position,
                "sigma": float(sigma),
                "loss": _number(loss),
            }
        )
    return found


def dump(session: Session, parts: list[RankBatch], step: int, report: dict[str, Any] | None) -> None:
    """Write this rank's batches, and on the main rank, which has a report, the report and the adapter.

    Call it before the gradient is clipped or cleared: the report names the tensors in which it is not finite.
    """
    job, data, transformer = session.job, session.data, session.model.transformer
    folder = session.run.folder / "skipped" / f"step-{step:06d}"
    for part in parts:
        batch = training_batch(job, data.cache, data.samples, part.indices, part.weight, torch.device("cpu"))
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "references"}
        tensors |= {f"references.{number}": each for number, each in enumerate(batch.references)}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})
        _write(folder / f"batch-{part.micro}-{part.slot}.safetensors", content)
    if report is None:
        return
    counts = {name: int((~p.grad.isfinite()).sum()) for name, p in transformer.named_parameters() if p.grad is not None}
    text = json.dumps(
        {
            **report,
            "gradients_not_finite": {name: count for name, count in counts.items() if count},
            "weights_not_finite": [
                n for n, p in transformer.named_parameters() if p.requires_grad and not p.isfinite().all()
            ],
            "optim": asdict(job.optim),
            "precision": asdict(job.precision),
        },
        indent=2,
    )
    _write(folder / "adapter.safetensors", save(adapter_state(transformer)))
    _write(folder / "report.json", f"{text}\n".encode())
    dumps = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for old in dumps[:-DUMPS]:
        shutil.rmtree(old)


def note_spike(session: Session, update: Update, loss: float, progress: Progress, events: Journal) -> None:
    """Record the update if its loss is far above the last ones, and remember the loss."""
    limit = threshold(progress.losses, session.job.spikes)
    if limit is not None and loss > limit and events.file is not None:
        event = {"event": "spike", "loss": loss, "threshold": limit, "gradient_norm": update.norm}
        events.log(progress.step, event | {"samples": describe(session, update)})
    progress.losses = remember(progress.losses, loss)
    progress.skipped_in_a_row = 0


def leave_out(session: Session, parts: list[RankBatch], update: Update, progress: Progress, events: Journal) -> None:
    """Record and dump an update that changes nothing, because its loss or gradient is not finite."""
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    report = None
    if session.run.main:
        event: dict[str, Any] = {"event": "skipped", "gradient_norm": _number(update.norm)}
        event |= {"samples": describe(session, update)}
        events.log(progress.step, event)
        report = {"step": progress.step, **event}
    dump(session, parts, progress.step, report)
    session.run.accelerator.wait_for_everyone()


def stop_after_too_many(session: Session, update: Update, progress: Progress) -> None:
    """Stop the run once too many updates in a row were left out.

    Raises:
        ValueError: `stop_after_bad` of them were.
    """
    if progress.skipped_in_a_row < session.job.stop_after_bad:
        return
    folder, samples = session.run.folder, session.data.samples
    names = ", ".join(dict.fromkeys(samples.all[index.sample].name for index, _, _ in update.losses))
    raise ValueError(
        f"the loss or its gradient was not finite {progress.skipped_in_a_row} times in a row, up to step "
        f"{progress.step}, where the samples were {names}: training stopped, the last checkpoint is in "
        f"{folder / 'checkpoints'}, and {folder / 'skipped'} holds what to look at; lower optim.lr or raise "
        "optim.warmup, or mend those samples"
    )
