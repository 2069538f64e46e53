"""Updates that were out of the ordinary: the samples that made them, by name, and what there is to look at.

`events.jsonl` has a line for each spike of the loss and each update that was left out because its loss or gradient was
not finite; the latest of the latter are kept whole in `skipped/step-000123/`: report.json, the adapter as it was, and
every rank's batches, with tensors named as in train/loop/batch.py.
"""

import json
import math
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import nn

from infer.adapter.attached import adapter_state
from infer.program.atomic import replace_file
from train.latents.store import Cache
from train.loop.batch import Samples, choices, training_batch
from train.objective.spikes import remember, threshold
from train.ranks.update import Part, Update
from train.run.config import Train
from train.state.journal import Journal
from train.state.progress import Progress

DUMPS = 3  # the latest are kept
NAMED = 32  # samples an event


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def _put(file: Path, content: bytes) -> None:
    replace_file(file, lambda path: path.write_bytes(content))


def describe(job: Train, cache: Cache, samples: Samples, update: Update) -> list[dict[str, Any]]:
    """The samples of an update, the one with the largest loss first (not finite before all): name, text as drawn, place
    in the stream, noise level and loss."""
    found = []
    order = sorted(update.losses, key=lambda one: one[1] if math.isfinite(one[1]) else math.inf, reverse=True)
    for place, loss, _ in order[:NAMED]:
        view, text = choices(job, cache, samples, place)
        sigma = training_batch(job, cache, samples, [place], 1.0, torch.device("cpu")).sigma
        found.append(
            {
                "sample": samples.all[place.sample].name,
                "text": text,
                "height": view.height,
                "width": view.width,
                "epoch": place.epoch,
                "position": place.position,
                "sigma": float(sigma),
                "loss": _number(loss),
            }
        )
    return found


def dump(
    job: Train,
    cache: Cache,
    samples: Samples,
    transformer: nn.Module,
    parts: list[Part],
    step: int,
    report: dict[str, Any] | None,
    folder: Path,
) -> None:
    """Write this rank's batches, and with a report (the main rank's) that and the adapter.

    Call it before the gradient is clipped or cleared: the report names the tensors in which it is not finite.
    """
    here = folder / "skipped" / f"step-{step:06d}"
    for part in parts:
        batch = training_batch(job, cache, samples, part.places, part.weight, torch.device("cpu"))
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})
        _put(here / f"batch-{part.micro}-{part.slot}.safetensors", content)
    if report is None:
        return
    bad = {name: int((~p.grad.isfinite()).sum()) for name, p in transformer.named_parameters() if p.grad is not None}
    text = json.dumps(
        {
            **report,
            "gradients_not_finite": {name: count for name, count in bad.items() if count},
            "weights_not_finite": [
                n for n, p in transformer.named_parameters() if p.requires_grad and not p.isfinite().all()
            ],
            "optim": asdict(job.optim),
            "precision": asdict(job.precision),
        },
        indent=2,
    )
    _put(here / "adapter.safetensors", save(adapter_state(transformer)))
    _put(here / "report.json", f"{text}\n".encode())
    for old in sorted(here.parent.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))[:-DUMPS]:
        shutil.rmtree(old)


def note_spike(
    job: Train, cache: Cache, samples: Samples, update: Update, loss: float, now: Progress, events: Journal
) -> None:
    """Record the update if its loss is far above the last ones, and remember the loss."""
    limit = threshold(now.losses, job.spikes)
    if limit is not None and loss > limit and events.file is not None:
        told = {"event": "spike", "loss": loss, "threshold": limit, "gradient_norm": update.norm}
        events.log(now.step, told | {"samples": describe(job, cache, samples, update)})
    now.losses = remember(now.losses, loss)
    now.skipped_in_a_row = 0


def leave_out(
    job: Train,
    accelerator: Accelerator,
    cache: Cache,
    samples: Samples,
    transformer: nn.Module,
    parts: list[Part],
    update: Update,
    now: Progress,
    events: Journal,
    folder: Path,
) -> None:
    """Record and dump an update that changes nothing, as its loss or gradient is not finite."""
    now.skipped += 1
    now.skipped_in_a_row += 1
    report = None
    if accelerator.is_main_process:
        told: dict[str, Any] = {"event": "skipped", "gradient_norm": _number(update.norm)}
        told |= {"samples": describe(job, cache, samples, update)}
        events.log(now.step, told)
        report = {"step": now.step, **told}
    dump(job, cache, samples, transformer, parts, now.step, report, folder)
    accelerator.wait_for_everyone()


def refuse_more(job: Train, samples: Samples, update: Update, now: Progress, folder: Path) -> None:
    """Stop the run once too many updates in a row were left out.

    Raises:
        ValueError: there were `stop_after_bad` of them.
    """
    if now.skipped_in_a_row < job.stop_after_bad:
        return
    names = ", ".join(dict.fromkeys(samples.all[place.sample].name for place, _, _ in update.losses))
    raise ValueError(
        f"the loss or its gradient was not finite {now.skipped_in_a_row} times in a row, up to step {now.step}, "
        f"where the samples were {names}: training stopped, the last checkpoint is in {folder / 'checkpoints'}, "
        f"and {folder / 'skipped'} holds what to look at; lower optim.lr or raise optim.warmup, or mend those samples"
    )
