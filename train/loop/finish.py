"""The end of a run: judge what was learned, save the adapter with its average, card and notes, free the device."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from infer.adapter.attached import save_adapter, update_norm
from infer.adapter.error_init import save_start
from infer.adapter.model_card import push, write_card
from infer.adapter.read import FILE
from infer.device.device import release
from train.loop.model_card import card_of
from train.loop.next_steps import ended_early, next_steps, what_to_change_first
from train.loop.session import Session
from train.run.config import Train
from train.state.identity import forget_adapters, record_adapters, set_card_aside
from train.state.progress import Progress, TrainingState


def finish(session: Session, training: TrainingState) -> Path:
    """Save what a run has learned; returns the adapter's folder.

    Raises:
        ValueError: nothing was learned, and nothing is saved; or the last previews were not drawn.
    """
    run, progress = session.run, training.progress
    asked, run.job = run.job.steps, replace(run.job, steps=progress.step)  # where it ended is what it has learned
    norm = update_norm(training.transformer)
    if not 0 < norm < math.inf:  # NaN too
        raise ValueError(nothing_learned(run.job, norm, progress.skipped, run.folder))
    if run.main:
        save_adapters(session, training, asked)
    session.tracker.finish()
    run.say(summary(run.job, norm, progress, run.folder, averaged=training.average is not None))
    if training.ended is not None:
        run.say(ended_early(run.job, asked, training.ended))
    for note in what_to_change_first(run.job, progress.judged, progress.scores):
        run.say(note)
    run.say(next_steps(run.job, run.folder, list(session.data.previews), session.data.edits))
    run.accelerator.wait_for_everyone()
    release(run.device)
    run.accelerator.end_training()
    if training.preview_error is not None:
        raise ValueError(f"the adapter is saved, but the last previews are not drawn: {training.preview_error}")
    return run.folder / "adapter"


def nothing_learned(job: Train, norm: float, skipped: int, folder: Path) -> str:
    """Why an adapter of this norm is not saved, and the mend."""
    said = f"the adapter's norm is {norm} after {job.steps} steps"
    older = f"go on from an older checkpoint in {folder / 'checkpoints'} with resume=step-..., or start over"
    if not math.isfinite(norm):
        return f"{said}: its weights are ruined; lower optim.lr or raise optim.warmup, and {older}"
    if skipped:
        return (
            f"{said}: {skipped} updates were left out, as their loss or gradient was not finite; lower optim.lr or "
            f"raise optim.warmup, or mend the samples that {folder / 'events.jsonl'} names, and start over"
        )
    return f"{said}: nothing was learned; raise optim.lr, or lower optim.warmup ({job.optim.warmup} steps)"


def save_adapters(session: Session, training: TrainingState, asked: int) -> None:
    """Write the adapter and its average with notes and card, record their checksums, and push them if asked to.

    asked: the steps that the run was to have.
    """
    job, folder, progress = session.job, session.run.folder, training.progress
    transformer, start = training.transformer, session.model.start
    notes: dict[str, Any] = {
        "step": job.steps,
        **({} if training.ended is None else {"ended": training.ended, "asked": asked, "stop": asdict(job.stop)}),
        # an adapter that goes on from one that starts at the quantization error is of that kind itself
        "adapter": asdict(job.adapter) | ({} if start is None else {"init": start.init}),
        "precision": asdict(job.precision),
        "base": session.resumption.base,
        "trigger": job.data.trigger,
        "validation": progress.validation,
    }
    edited = set_card_aside(folder)
    if edited is not None:
        session.run.say(f"note: the card was edited; as it was it is {edited} now, beside the new one")
    forget_adapters(folder)
    if training.average is not None:
        with training.average.applied():
            if start is not None:
                save_start(start.here, folder / "adapter-ema")
            averaged = {"ema": job.ema, "validation": progress.validation_ema}
            save_adapter(transformer, folder / "adapter-ema", notes | averaged)
    if start is not None:
        save_start(start.here, folder / "adapter")
    write_card(folder / "adapter", card_of(job, folder, progress.validation))
    save_adapter(transformer, folder / "adapter", notes)
    record_adapters(folder)
    session.tracker.adapter(folder / "adapter", notes)
    if job.push is not None:
        session.run.say(f"pushed: {push(folder / 'adapter', job.push)}")


def summary(job: Train, norm: float, progress: Progress, folder: Path, averaged: bool) -> str:
    """What the run has learned and where the adapters are."""
    learned = f"learned: adapter norm {norm:.3f}"
    for name, losses in (
        ("validation loss", progress.validation),
        ("of the averaged weights", progress.validation_ema),
    ):
        if losses:
            before, after = next(iter(losses.values())), losses[str(job.steps)]
            learned += f", {name} {before:.4f} -> {after:.4f} ({100 * (after - before) / before:+.1f} %)"
    if progress.skipped:
        events = folder / "events.jsonl"
        learned += f"\n{progress.skipped} updates were left out as not finite: {events} names their samples"
    learned += f"\nadapter: {folder / 'adapter' / FILE}"
    return learned + (f"\naveraged: {folder / 'adapter-ema' / FILE}" if averaged else "")
