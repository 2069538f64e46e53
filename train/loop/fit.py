"""The training loop: save, stop, validate, draw previews, step, log.

Every random number has a key (train/data/seeds.py): a sample's noise to its position in the endless shuffled
order of the samples (train/data/batches.py), whatever the number of ranks. So a run that resumes at step k goes on as
if it had never stopped. A checkpoint is the state right after an update; whatever else is due at its step comes after
it, and is repeated if the run resumes there.
"""

import time
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

from infer.device.device import release
from infer.sample.encode import NotFiniteError
from infer.sample.generate import settled
from train.data.batches import batches_from
from train.loop.bad_updates import stop_after_too_many
from train.loop.batch import batch_sampler, largest_batch
from train.loop.loss_picture import draw_loss
from train.loop.memory import start_memory
from train.loop.micro_step import fit_budget, make_learner
from train.loop.picture_losses import NAME, PictureLosses
from train.loop.preview import preview, preview_size
from train.loop.scores import score
from train.loop.second import second_of
from train.loop.session import Loop, Session
from train.loop.spill import Spill
from train.loop.step import take_step
from train.loop.validation import validate
from train.objective.ema import make_average
from train.objective.optim import make_optimizer, make_schedule
from train.ranks.launch import broadcast_adapter, uses_fsdp, uses_zero2
from train.ranks.zero2 import ZeroTwo
from train.run.early_stop import why_stop
from train.state.checkpoint import read_checkpoint
from train.state.journal import Journal
from train.state.progress import Progress, TrainingState, remove_old_checkpoints, restore, save


def fit(session: Session) -> TrainingState | None:
    """Train to the last step; None if the run was stopped before it, with its state saved.

    Raises:
        ValueError: too many updates in a row were not finite, or the run cannot go on from its checkpoint.
    """
    job = session.job
    loop = start_loop(session)
    while True:
        scores_due = job.scores_every > 0 and loop.step > 0 and loop.due(job.scores_every)
        validation_due = loop.step == 0 or loop.due(job.validate_every) or scores_due
        if loop.step > loop.first and (
            loop.due(job.save_every) or loop.stop_requested or loop.save_requested or (job.keep_best and validation_due)
        ):
            save_state(loop)
        if loop.stop_requested:
            break
        if validation_due:
            measure(loop)
        if scores_due:
            score(loop)
        if validation_due and loop.step < job.steps:
            end_early(loop)
        if loop.step > 0 and (loop.training.ended or loop.due(job.preview_every) or loop.sample_requested):
            draw_previews(loop)
            if loop.step < job.steps:  # after the last step it is drawn below
                draw_loss(session.run)
        if loop.step == job.steps or loop.training.ended:
            break
        started = time.perf_counter()
        update, figures = take_step(loop)
        log_step(loop, figures, time.perf_counter() - started)
        stop_after_too_many(session, update, loop.training.progress)
    loop.bar.close()
    draw_loss(session.run)
    return None if loop.stop_requested else loop.training


def start_loop(session: Session) -> Loop:
    """Make the optimizer and all else that the loop works with, and restore the checkpoint that the run resumes."""
    run, job, model, data = session.run, session.job, session.model, session.data
    optimizer: Any = make_optimizer(job.optim, model.parameters)
    schedule = make_schedule(job.optim, optimizer, job.steps)
    broadcast_adapter(model.parameters, run.accelerator)
    average = make_average(job.ema, model.transformer, model.parameters)
    progress = Progress(data.samples.fingerprint(data.cache), session.resumption.base, levels=job.validation_levels)
    training = TrainingState(model.transformer, average, optimizer, schedule, progress, run.folder)
    resumed = resume(session, training)
    first = training.progress.step
    if uses_zero2():
        optimizer = ZeroTwo(optimizer, model.parameters)
    model.transformer.train()
    keep_lines = first if resumed else -1
    metrics = Journal(run.folder / "metrics.jsonl", keep_lines, run.main)
    events = Journal(run.folder / "events.jsonl", keep_lines, run.main)
    original_ranks = session.resumption.original_ranks
    sampler = batch_sampler(data.samples, data.cache, job.data, job.seed, original_ranks)
    batches = batches_from(sampler, first * job.accumulation)
    turns = -(-original_ranks // run.ranks)
    learn = make_learner(job, run.accelerator, model.transformer, model.parameters, model.offload, turns)
    if model.offload is not None:
        largest = largest_batch(job, data.cache, data.samples, run.device)
        resident = fit_budget(job, learn, model.parameters, optimizer, model.offload, largest)
        run.say(f"{resident} of {len(model.offload.blocks)} blocks stay on the device, the others are streamed")
    start_memory(run.device)
    bar = tqdm(total=job.steps, initial=first, unit="step", desc="train", disable=not run.main)
    pictures = PictureLosses(run.folder / NAME, resumed)
    spill, saved_at = Spill(run.device), time.monotonic()
    run.stop.defer()
    return Loop(
        session, training, optimizer, first, learn, batches, metrics, events, bar, pictures, spill, saved_at, resumed,
        second_of(job),
    )  # fmt: skip


def resume(session: Session, training: TrainingState) -> bool:
    """Restore the checkpoint that the run resumes, if there is one; returns whether there is."""
    run, resumption = session.run, session.resumption
    if resumption.path is None:
        return False
    # the main rank has read it already, when it was chosen
    checkpoint = resumption.checkpoint or read_checkpoint(resumption.path)
    resumption.checkpoint = None  # its memory is free afterwards
    restore(training, checkpoint, run.accelerator)
    run.say(f"resuming at step {training.progress.step} of {session.job.steps}")
    return True


def save_state(loop: Loop) -> None:
    """Write the checkpoint of this step, and remove the ones that are not kept."""
    run, job = loop.session.run, loop.session.job
    # ZeRO-2 gathers the optimizer's state from all ranks
    optimizer = loop.optimizer.state_dict() if run.main or uses_zero2() else {}
    if run.main:
        if run.lock is not None:
            run.lock.check()
        loop.metrics.sync()
        loop.events.sync()
        save(loop.training, optimizer)
        remove_old_checkpoints(loop.training, job.keep, job.keep_best)
        loop.pictures.write(loop.step)
    loop.saved_at, loop.saved = time.monotonic(), True
    run.accelerator.wait_for_everyone()


def measure(loop: Loop) -> None:
    """Validate the adapter, and its average if there is one."""
    session, progress, average = loop.session, loop.training.progress, loop.training.average
    job, data = session.job, session.data
    weights: list[Any] = [("", progress.validation, nullcontext())]
    if average:
        weights.append(("_ema", progress.validation_ema, average.applied()))
    if data.samples.validation:
        release_blocks(session)
    for whose, losses, applied in weights:
        with applied:
            parts = session.run.accelerator, session.model.transformer, data.cache, data.samples
            value = validate(job, *parts, loop.step)
        if value is None:
            continue
        means, by_level = value
        losses[str(loop.step)] = means["validation_loss"]
        figures = {f"{name}{whose}": each for name, each in means.items()}
        if session.run.main:
            said = ", ".join(f"{name.replace('_', ' ')} {each:.4f}" for name, each in figures.items())
            loop.bar.write(f"step {loop.step}: {said}")
        loop.metrics.log(loop.step, {**figures, f"validation_loss{whose}_by_level": by_level})
        session.tracker.log(loop.step, figures)
    if session.run.main:
        loop.pictures.write(loop.step)
        remove_old_checkpoints(loop.training, job.keep, job.keep_best)


def draw_previews(loop: Loop) -> None:
    """Draw the previews of this step on the main rank. Previews that are not finite do not end the training."""
    session, run, job = loop.session, loop.session.run, loop.session.job
    if session.data.previews and (run.main or uses_fsdp()):  # under FSDP all ranks gather the weights
        loop.bar.set_postfix_str("drawing previews")
        release_blocks(session)
        transformer, average = session.model.transformer, loop.training.average
        transformer.eval()
        drawn, loop.training.preview_error = [], None
        try:
            drawn = preview(
                transformer,
                job.model,
                session.data.previews,
                settled(job.sampling, job.model),
                preview_size(job),
                job.seed,
                run.device,
                run.folder / "previews" / f"step-{loop.step:06d}.png",
                run.main,
                average.applied() if average else None,
                loop.base_latents,
                loop.second,
            )
        except torch.OutOfMemoryError:
            if uses_fsdp():  # the other ranks are drawing
                raise
            loop.bar.write(
                f"step {loop.step}: the previews are not drawn, as the GPU ran out of memory; training goes on. Set "
                "sampling.height and sampling.width lower, or previews=[]"
            )
            release(run.device)
        except NotFiniteError as error:
            loop.training.preview_error = str(error)
            loop.bar.write(f"step {loop.step}: the previews are not drawn: {error}")
        transformer.train()
        start_memory(run.device)
        session.tracker.previews(loop.step, drawn)
    run.accelerator.wait_for_everyone()


def end_early(loop: Loop) -> None:
    """Note why the run ends at this step, if what was measured says so, and save its state."""
    progress = loop.training.progress
    reason = why_stop(loop.session.job.stop, progress.judged, progress.scores)
    if reason is not None:
        loop.training.ended = reason
        save_state(loop)


def release_blocks(session: Session) -> None:
    """Free the device memory of offloaded blocks, so that validation and previews stay within the memory budget."""
    if session.model.offload is not None:
        session.model.offload.release()


def log_step(loop: Loop, figures: dict[str, float], seconds: float) -> None:
    """Log the figures of an update, and show them in the progress bar."""
    figures["seconds"] = seconds
    loop.metrics.log(loop.step, figures)
    loop.session.tracker.log(loop.step, figures)
    said = f"loss {figures['loss']:.4f}" if "loss" in figures else f"{figures['skipped']} skipped"
    rate, gigabytes = figures["lr"], figures["memory_gib"]
    loop.bar.set_postfix_str(f"{said}, lr {rate:.1e}, {seconds:.2f} s/step, {gigabytes:.2f} GiB", refresh=False)
    loop.bar.update()
    if loop.session.run.main and (warning := loop.spill.note(seconds)) is not None:
        loop.bar.write(warning)
