"""A training run from its config to its adapter's file, on one rank of those that were launched."""

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from infer.program.errors import STOPPED
from infer.resident.turns import training_turn
from train.data.source import Sample, Skipped
from train.loop.begin import begin
from train.loop.finish import finish
from train.loop.fit import fit
from train.loop.load import encode, load_model
from train.loop.session import Run, Session
from train.ranks.launch import make_accelerator
from train.ranks.peers import watch_peers
from train.run.config import Train
from train.state.latest import recorded
from train.state.requests import heard
from train.state.run_lock import lock_run
from train.state.signals import StopSignals
from train.trackers.tracker import make_tracker


def run(job: Train, folder: Path, samples: list[Sample], skipped: list[Skipped], stop: StopSignals) -> Path:
    """Train; returns the adapter's folder. If a signal stops the run, it leaves by SystemExit with code 3.

    samples, skipped: as `read_samples` found them.
    """
    accelerator = make_accelerator(job)
    with watch_peers(accelerator.process_index, accelerator.num_processes, print), ExitStack() as held:
        this = Run(job, folder, accelerator, stop, None)
        if this.main:
            this.lock = held.enter_context(lock_run(folder, accelerator.print))
            held.enter_context(recorded(folder, this.ranks, lambda: stop.reason))
            this.requests = held.enter_context(heard(folder, stop))
            held.enter_context(training_turn(accelerator.print))
        adapter = train_on_rank(this, samples, skipped)
    if adapter is None:
        sys.exit(STOPPED)
    return adapter


def train_on_rank(run: Run, samples: list[Sample], skipped: list[Skipped]) -> Path | None:
    """Train on this rank; returns the adapter's folder, or None if the run was stopped."""
    resumption = begin(run)
    if isinstance(resumption, Path):
        return resumption  # the run was finished before
    data = encode(run, samples, skipped)
    model = load_model(run)
    job = run.job
    tracker = make_tracker(job.track if run.main else type(job.track)("none"), job.run, run.folder, asdict(job))
    session = Session(run, resumption, data, model, tracker)
    try:
        training = fit(session)
    except BaseException as error:
        tracker.fail(error)
        raise
    if training is None:
        say_stopped(session)
        return None
    return finish(session, training)


def say_stopped(session: Session) -> None:
    """End the tracker and the ranks of a run whose state is saved."""
    run = session.run
    session.tracker.finish()
    reason = run.stop.reason or "another process was asked to"
    run.say(f"stopped ({reason}); its state is saved, the same command goes on")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
