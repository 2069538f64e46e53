"""The training loop: validate, draw previews, save, stop, learn, log.

Every random number is drawn for a place (train/seeds.py): a sample's noise belongs to its position in the endless
shuffled stream of samples (train/sampler.py), whatever the number of ranks, and a run that resumes at step k goes on as
if it had never stopped.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import nn
from tqdm import tqdm

from infer.adapters import adapter_state, set_adapter_state
from infer.atomic import replace_file
from infer.encode import Text
from infer.stream import Stream
from train.batch import Samples, largest_batch, make_stream, training_batch, validation_batch, validation_parts
from train.cache import Cache
from train.checkpoint import optimizer_to, read_latest, save_checkpoint
from train.config import Train
from train.optim import make_optimizer, make_schedule
from train.preview import preview
from train.ranks import exchange, shards, start_alike
from train.sampler import batches_from, share
from train.seeds import derive
from train.step import batch_losses, fit_budget, make_learner
from train.track import Tracker


def validate(job: Train, accelerator: Accelerator, transformer: Any, cache: Cache, samples: Samples) -> float | None:
    """The mean objective over the held-out pictures, by their masks but by no weights; None if none is held out."""
    if not samples.validation:
        return None
    place = accelerator.process_index, accelerator.num_processes
    transformer.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    of_ranks = [validation_parts(job, cache, samples, rank, place[1]) for rank in range(place[1])]
    own = of_ranks[place[0]]
    with torch.no_grad():
        # where weights are shared, all ranks take part in each forward pass: who is done repeats one, uncounted
        for turn in range(max(map(len, of_ranks)) if shards() else len(own)):
            counts = turn < len(own)
            batch = validation_batch(job, cache, samples, own[turn] if counts else of_ranks[0][0], accelerator.device)
            values = batch_losses(transformer, batch, job, "none")
            if counts:
                total += total.new_tensor([values.double().sum().item(), len(values)])
    transformer.train()
    summed: Any = accelerator.reduce(total, "sum")
    return float(summed[0] / summed[1])


def start_memory(device: torch.device) -> None:
    """Forget the peak of what came before the training itself."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_bytes(device: torch.device) -> int:
    """The peak so far. CUDA: of what torch allocated. CPU: of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Journal:
    """metrics.jsonl: one line an event. A resumed run drops the lines beyond its checkpoint first."""

    def __init__(self, file: Path, step: int, write: bool) -> None:
        self.file = file if write else None
        if write and file.is_file():
            lines = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            replace_file(file, lambda path: path.write_text("".join(f"{line}\n" for line in lines)))

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self.file is not None:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": step, **figures}) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line torn by a crash


def fit(
    job: Train,
    accelerator: Accelerator,
    transformer: FluxTransformer2DModel,
    parameters: list[nn.Parameter],
    cache: Cache,
    samples: Samples,
    stream: Stream | None,
    previews: dict[str, Text],
    size: tuple[int, int],
    tracker: Tracker,
    folder: Path,
) -> dict[str, float]:
    """Train to the last step; returns the validation loss by step, as text keys.

    parameters: the adapter's. stream: of the transformer's blocks, where memory has a budget. previews: prompts with
    their embeddings; size: their height and width.

    Raises:
        ValueError: the loss is not finite.
    """
    device, main = accelerator.device, accelerator.is_main_process
    place = accelerator.process_index, accelerator.num_processes
    optimizer = make_optimizer(job.optim, parameters)
    schedule = make_schedule(job.optim, optimizer, job.steps)
    step, history = 0, {}
    identity = samples.fingerprint(cache)
    latest = read_latest(folder / "checkpoints", accelerator.print)
    if latest is not None:
        adapter, optimizer_state, state = latest
        if state["samples"] != identity:
            raise ValueError(
                "the pictures, captions or the held-out share have changed since the last checkpoint in "
                f"{folder / 'checkpoints'}; choose another name with run=..., or delete {folder} to start over"
            )
        set_adapter_state(transformer, adapter)
        optimizer.load_state_dict(optimizer_to(optimizer_state, device))
        schedule.load_state_dict(state["schedule"])
        step, history = state["step"], state["validation"]
        accelerator.print(f"resuming at step {step} of {job.steps}")
    resumed = latest is not None
    transformer.train()
    start_alike(parameters, accelerator)
    journal = Journal(folder / "metrics.jsonl", step if resumed else -1, main)
    order = make_stream(samples, cache, job.data, job.seed, accelerator.num_processes)
    batches = batches_from(order, step * job.accumulation)
    learn = make_learner(job, accelerator, transformer, parameters, stream)
    if stream is not None:
        resident = fit_budget(job, learn, parameters, stream, largest_batch(job, cache, samples, device))
        accelerator.print(f"{resident} of {len(stream.blocks)} blocks stay on the device, the others are streamed")
    start_memory(device)
    bar = tqdm(total=job.steps, initial=step, unit="step", desc="train", disable=not main)

    while True:
        last = step == job.steps
        due = step == 0 or last or (job.validate_every > 0 and step % job.validate_every == 0)
        if due and not resumed:
            value = validate(job, accelerator, transformer, cache, samples)
            if value is not None:
                history[str(step)] = value
                if main:
                    bar.write(f"step {step}: validation loss {value:.4f}")
                journal.log(step, {"validation_loss": value})
                tracker.log(step, {"validation_loss": value})

        if previews and not resumed and (last or (job.preview_every > 0 and step % job.preview_every == 0)):
            if main or shards():  # shared weights are gathered by all
                bar.set_postfix_str("drawing previews")
                file = folder / "previews" / f"step-{step:06d}.png"
                transformer.eval()
                shown = preview(transformer, job.model, previews, job.sampling, size, job.seed, device, file, main)
                transformer.train()
                start_memory(device)
                tracker.previews(step, shown)
            accelerator.wait_for_everyone()

        if not resumed and step > 0 and (last or (job.save_every > 0 and step % job.save_every == 0)):
            if main:
                rest = {
                    "schedule": schedule.state_dict(),
                    "validation": history,
                    "samples": identity,
                }
                state_now = optimizer.state_dict()
                save_checkpoint(folder / "checkpoints", step, adapter_state(transformer), state_now, rest, job.keep)
            accelerator.wait_for_everyone()

        resumed = False
        if last:
            break

        start = time.perf_counter()
        total = 0.0
        for micro in range(job.accumulation):
            places, weight = share(next(batches), *place, job.data.batch_size)
            batch = training_batch(job, cache, samples, places, weight, device)
            torch.manual_seed(derive(job.seed, "dropout", step, micro, accelerator.process_index))
            total += learn(batch)
        exchange(parameters, accelerator)
        norm = nn.utils.clip_grad_norm_(parameters, job.optim.clip if job.optim.clip > 0 else math.inf)
        if not math.isfinite(total) or not torch.isfinite(norm):
            raise ValueError(
                f"the loss is {total} and the gradient's norm {norm.item()} at step {step}: training stopped, the last "
                f"checkpoint is in {folder / 'checkpoints'}; lower optim.lr or raise optim.warmup"
            )
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1

        seconds = time.perf_counter() - start
        gigabytes = memory_bytes(device) / 2**30
        averaged: Any = accelerator.reduce(torch.tensor(total, device=device), "mean")
        figures: dict[str, float] = {
            "loss": float(averaged),
            "lr": float(rate),
            "gradient_norm": float(norm),
            "seconds": seconds,
            "memory_gib": gigabytes,
        }
        journal.log(step, figures)
        tracker.log(step, figures)
        bar.set_postfix_str(
            f"loss {figures['loss']:.4f}, lr {rate:.1e}, {seconds:.2f} s/step, {gigabytes:.2f} GiB", refresh=False
        )
        bar.update()

    bar.close()
    return history
