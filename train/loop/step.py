"""One update: learn from its batches on all ranks, then change the weights, or leave the update out if it is not
finite."""

import math
import time
import warnings

import torch
from torch import Tensor, nn

from train.data.dataset import sources_of
from train.data.seeds import derive
from train.loop.bad_updates import leave_out, note_spike
from train.loop.batch import training_batch
from train.loop.memory import memory_bytes
from train.loop.session import Loop
from train.objective.optim import step_if
from train.ranks.launch import average_gradients
from train.ranks.update import RankBatch, Update, batches_of_rank, read_update, reduce_update

FIRST = 1.0  # minutes after which a new run has a checkpoint, however slow its steps are


def take_step(loop: Loop) -> tuple[Update, dict[str, float]]:
    """One update; returns what all ranks know of it, and its figures."""
    session, training, progress = loop.session, loop.training, loop.training.progress
    run, job, parameters = session.run, session.job, session.model.parameters
    batches = [next(loop.batches) for _ in range(job.accumulation)]
    sizes = job.data.batch_size, session.resumption.original_ranks
    mine = batches_of_rank(batches, run.rank, run.ranks, *sizes)
    learned = [learn_from(loop, part) for part in mine]
    losses = [values for values, _ in learned]
    average_gradients(parameters, run.accelerator)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    asked = run.requests
    save, sample = (asked is not None and asked.pop(kind) for kind in ("save", "sample"))
    reduced = reduce_update(
        run.accelerator,
        job.data.batch_size,
        losses,
        norm,
        run.stop.requested(),
        save or save_overdue(loop),
        sample,
    )
    # queued before anybody has read the losses, so that the device does not wait
    queued = isinstance(loop.optimizer, torch.optim.AdamW)
    if queued:
        step_if(loop.optimizer, reduced.isfinite().all(), norm, job.optim.clip)
    update = read_update(reduced, run.ranks, batches, *sizes)
    progress.step += 1
    figures = {"lr": float(training.schedule.get_last_lr()[0]), "memory_gib": memory_bytes(run.device) / 2**30}
    if update.finite:
        if not queued:
            nn.utils.clip_grads_with_norm_(parameters, job.optim.clip if job.optim.clip > 0 else math.inf, norm)
            loop.optimizer.step()
        training.schedule.step()
        if training.average:
            training.average.update()
        figures |= {"loss": loss_of(loop, update), "gradient_norm": update.norm}
        note_spike(session, update, figures["loss"], progress, loop.events)
        note_pictures(loop, mine, learned)
    else:
        figures |= {"skipped": progress.skipped + 1}
        leave_out(session, mine, update, progress, loop.events)
        with warnings.catch_warnings(action="ignore"):  # that the optimizer has not stepped yet
            training.schedule.step()
    loop.optimizer.zero_grad()
    loop.stop_requested, loop.save_requested, loop.sample_requested = update.stop, update.save, update.sample
    return update, figures


def learn_from(loop: Loop, part: RankBatch) -> tuple[Tensor, Tensor]:
    """Add the gradient of a part of a batch; returns the loss and the noise level of each sample, [b] each, without
    waiting for the device."""
    session, job, data = loop.session, loop.session.job, loop.session.data
    batch = training_batch(job, data.cache, data.samples, part.indices, part.weight, session.run.device)
    torch.manual_seed(derive(job.seed, "dropout", loop.step, part.micro, part.slot))
    return loop.learn(batch), batch.sigma


def note_pictures(loop: Loop, mine: list[RankBatch], learned: list[tuple[Tensor, Tensor]]) -> None:
    """Remember this rank's losses by picture, on the main rank. The device has finished them."""
    if not loop.session.run.main:
        return
    samples = loop.session.data.samples.all
    for part, (losses, sigmas) in zip(mine, learned, strict=True):
        if part.weight > 0:
            names = [samples[index.sample].name for index in part.indices]
            loop.pictures.note(names, sigmas.tolist()[: len(names)], losses.tolist()[: len(names)])


def loss_of(loop: Loop, update: Update) -> float:
    """The update's loss: of all samples, with their sources' weights."""
    samples = loop.session.data.samples
    weights = [source.weight for source in sources_of(loop.session.job.data)]
    return sum(share * weights[samples.all[index.sample].source] * loss for index, loss, share in update.losses)


def save_overdue(loop: Loop) -> bool:
    """Whether the last checkpoint is older than `save_minutes`, or a new run's first one is due; the main rank decides
    for all."""
    minutes = loop.session.job.save_minutes
    if not loop.saved:
        minutes = min(minutes, FIRST)
    return loop.session.run.main and minutes > 0 and time.monotonic() - loop.saved_at > 60 * minutes
