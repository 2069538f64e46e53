"""The training loop: save, validate, draw previews, stop, learn, log.

Every random number is drawn for a place (train/data/seeds.py): a sample's noise belongs to its position in the endless
shuffled stream of samples (train/data/batches.py), whatever the number of ranks, and a run that resumes at step k goes
on as if it had never stopped. A checkpoint is the state right after an update; what else is due at its step comes after
it, and comes again if the run resumes there.
"""

import math
import resource
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import nn
from tqdm import tqdm

from infer.device import allocator
from infer.fast.offload import Offload
from infer.sample.encode import NotFiniteError, Text
from train.data.batches import batches_from
from train.data.dataset import sources_of
from train.data.seeds import derive
from train.latents.store import Cache
from train.loop.bad_updates import leave_out, note_spike, refuse_more
from train.loop.batch import Samples, largest_batch, make_stream, training_batch
from train.loop.micro_step import fit_budget, make_learner
from train.loop.preview import preview
from train.loop.spill import Spill
from train.loop.validation import validate
from train.objective.ema import make_average
from train.objective.optim import make_optimizer, make_schedule, step_if
from train.ranks.launch import exchange, shards, start_alike, zero
from train.ranks.update import divide, hear, tell
from train.ranks.zero2 import ZeroTwo
from train.run.config import Train
from train.state.journal import Journal
from train.state.progress import Parts, Progress, clear, restore, save
from train.state.run_lock import Hold
from train.state.signals import Stop
from train.trackers.options import Tracker


def start_memory(device: torch.device) -> None:
    """Forget the peak of what came before the training itself."""
    if device.type == "cuda":
        allocator.reset_peak(device)


def memory_bytes(device: torch.device) -> int:
    """The peak so far. CUDA: of what torch allocated. CPU: of the process's resident set."""
    if device.type == "cuda":
        return allocator.peak(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fit(
    job: Train,
    accelerator: Accelerator,
    transformer: FluxTransformer2DModel,
    parameters: list[nn.Parameter],
    cache: Cache,
    samples: Samples,
    stream: Offload | None,
    previews: dict[str, Text],
    size: tuple[int, int],
    tracker: Tracker,
    folder: Path,
    base: str,
    begun: int,
    stop: Stop,
    hold: Hold | None,
) -> Parts | None:
    """Train to the last step; None if it was stopped before, with its state saved.

    parameters: the adapter's. stream: of the transformer's blocks, where memory has a budget.
    previews: prompts with their embeddings; size: their height and width. base: the transformer's hash. begun: the
    ranks that the run began with. hold: of the run's folder, on the main rank.

    Raises:
        ValueError: too many updates in a row were not finite, or the run cannot go on from its checkpoint.
    """
    device, main = accelerator.device, accelerator.is_main_process
    rank, ranks = accelerator.process_index, accelerator.num_processes
    optimizer: Any = make_optimizer(job.optim, parameters)
    schedule = make_schedule(job.optim, optimizer, job.steps)
    start_alike(parameters, accelerator)
    average = make_average(job.ema, transformer, parameters)
    parts = Parts(transformer, average, optimizer, schedule, Progress(samples.fingerprint(cache), base), folder)
    resumed = restore(parts, job, accelerator)
    now = parts.progress
    first = now.step
    if resumed:
        accelerator.print(f"resuming at step {now.step} of {job.steps}")
    if zero():
        optimizer = ZeroTwo(optimizer, parameters)
    transformer.train()
    journal = Journal(folder / "metrics.jsonl", first if resumed else -1, main)
    events = Journal(folder / "events.jsonl", first if resumed else -1, main)
    order = make_stream(samples, cache, job.data, job.seed, begun)
    stream_of_batches = batches_from(order, first * job.accumulation)
    learn = make_learner(job, accelerator, transformer, parameters, stream, -(-begun // ranks))
    weights = [source.weight for source in sources_of(job.data)]
    if stream is not None:
        resident = fit_budget(job, learn, parameters, optimizer, stream, largest_batch(job, cache, samples, device))
        accelerator.print(f"{resident} of {len(stream.blocks)} blocks stay on the device, the others are offloaded")
    start_memory(device)
    bar = tqdm(total=job.steps, initial=first, unit="step", desc="train", disable=not main)
    stopping, save_now, saved = False, False, time.monotonic()
    # the update is queued before anybody has seen the losses, or the device would wait for it
    ahead = isinstance(optimizer, torch.optim.AdamW)
    spill = Spill(device)
    stop.gently()

    def due(every: int) -> bool:
        return now.step == job.steps or (every > 0 and now.step % every == 0)

    while True:
        measured = now.step == 0 or due(job.validate_every)
        if now.step > first and (due(job.save_every) or stopping or save_now or (job.keep_best and measured)):
            learned = optimizer.state_dict() if main or zero() else {}  # shared out, it is gathered from all
            if main:
                if hold is not None:
                    hold.check()
                journal.sync()
                events.sync()
                save(parts, learned)
                clear(parts, job)
            saved = time.monotonic()
            accelerator.wait_for_everyone()
        if stopping:
            break

        if measured:
            kinds: list[Any] = [("validation_loss", now.validation, nullcontext())]
            if average:
                kinds.append(("validation_loss_ema", now.validation_ema, average.used()))
            if stream is not None and samples.validation:
                stream.release()  # measuring and drawing take their memory within the budget
            for name, history, used in kinds:
                with used:
                    value = validate(job, accelerator, transformer, cache, samples)
                if value is not None:
                    history[str(now.step)] = value
                    if main:
                        bar.write(f"step {now.step}: {name.replace('_', ' ')} {value:.4f}")
                    journal.log(now.step, {name: value})
                    tracker.log(now.step, {name: value})
            if main:
                clear(parts, job)

        if previews and due(job.preview_every):
            if main or shards():  # shared weights are gathered by all
                bar.set_postfix_str("drawing previews")
                if stream is not None:
                    stream.release()
                file = folder / "previews" / f"step-{now.step:06d}.png"
                transformer.eval()
                averaged = average.used() if average else None
                place = size, job.seed, device, file, main, averaged
                shown, parts.undrawn = [], None
                try:
                    shown = preview(transformer, job.model, previews, job.sampling, *place)
                except NotFiniteError as error:  # which ends no training
                    parts.undrawn = str(error)
                    bar.write(f"step {now.step}: the previews are not drawn: {error}")
                transformer.train()
                start_memory(device)
                tracker.previews(now.step, shown)
            accelerator.wait_for_everyone()

        if now.step == job.steps:
            break

        start = time.perf_counter()
        batches = [next(stream_of_batches) for _ in range(job.accumulation)]
        own = divide(batches, rank, ranks, job.data.batch_size, begun)
        losses = []
        for part in own:
            batch = training_batch(job, cache, samples, part.places, part.weight, device)
            torch.manual_seed(derive(job.seed, "dropout", now.step, part.micro, part.slot))
            losses.append(learn(batch))
        exchange(parameters, accelerator)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        overdue = main and job.save_minutes > 0 and time.monotonic() - saved > 60 * job.save_minutes
        told = tell(accelerator, job.data.batch_size, losses, norm, stop.wanted(), overdue)
        if ahead:
            step_if(optimizer, told.isfinite().all(), norm, job.optim.clip)
        update = hear(told, ranks, batches, job.data.batch_size, begun)
        loss = sum(share * weights[samples.all[place.sample].source] * value for place, value, share in update.losses)
        now.step += 1
        rate = schedule.get_last_lr()[0]
        figures = {"lr": float(rate), "memory_gib": memory_bytes(device) / 2**30}
        if update.finite:
            if not ahead:
                nn.utils.clip_grads_with_norm_(parameters, job.optim.clip if job.optim.clip > 0 else math.inf, norm)
                optimizer.step()
            schedule.step()
            if average:
                average.update()
            figures |= {"loss": loss, "gradient_norm": update.norm}
            note_spike(job, cache, samples, update, loss, now, events)
        else:
            figures |= {"skipped": now.skipped + 1}
            leave_out(job, accelerator, cache, samples, transformer, own, update, now, events, folder)
            with warnings.catch_warnings(action="ignore"):  # of an optimizer that has not stepped yet
                schedule.step()
        optimizer.zero_grad()
        stopping, save_now = update.stop, update.save

        figures["seconds"] = time.perf_counter() - start
        journal.log(now.step, figures)
        tracker.log(now.step, figures)
        said = f"loss {loss:.4f}" if update.finite else f"{now.skipped} skipped"
        seconds, gigabytes = figures["seconds"], figures["memory_gib"]
        bar.set_postfix_str(f"{said}, lr {rate:.1e}, {seconds:.2f} s/step, {gigabytes:.2f} GiB", refresh=False)
        bar.update()
        if main and (warning := spill.note(seconds)) is not None:
            bar.write(warning)
        refuse_more(job, samples, update, now, folder)

    bar.close()
    return None if stopping else parts
