"""A training run from its config to its adapter's file, on the ranks that there are."""

import math
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from infer.adapter.attach import attach, began, load_recovery
from infer.adapter.attached import save_adapter, strengths, update_norm
from infer.adapter.error_init import save_start, start_from_error
from infer.adapter.lora import FROM_ERROR
from infer.adapter.model_card import push, write_card
from infer.adapter.read import FILE, read_notes
from infer.checkpoint.headers import check_transformer
from infer.checkpoint.load import fingerprint, load_transformer, own_size, part_folder, read_config
from infer.device.device import release
from infer.fast.install import choose_path, hold_of
from infer.program.errors import STOPPED
from infer.quantize.compute import stored_on
from infer.rounding.layer_errors import decide
from train.data.caption import all_texts
from train.data.dataset import check_left
from train.data.source import Sample, Skipped
from train.estimate.plan import announce
from train.latents.build import build
from train.latents.prior import prior_samples
from train.loop.batch import choose
from train.loop.checks import check_job
from train.loop.fit import fit
from train.loop.model_card import card_of
from train.objective.optim import rate_at
from train.ranks.launch import check_shared, make_accelerator, shard, shards
from train.ranks.peers import watching
from train.run.config import Train, check_half
from train.state.checkpoint import find_checkpoint, read_checkpoint
from train.state.identity import begun_steps, claim, forget_adapters, note_steps, record_adapters
from train.state.progress import refuse_other
from train.state.run_lock import Hold, hold_run
from train.state.signals import Stop
from train.trackers.options import make_tracker


def run(job: Train, folder: Path, samples: list[Sample], skipped: list[Skipped], stop: Stop) -> Path:
    """Train; returns the adapter's folder. Stopped by a signal it leaves by SystemExit, with code 3.

    samples, skipped: what `read_samples` found.
    """
    accelerator = make_accelerator(job)
    with watching(accelerator.process_index, accelerator.num_processes, print):
        held = hold_run(folder, accelerator.print) if accelerator.is_main_process else nullcontext()
        with held as hold:
            adapter = train_on(job, accelerator, folder, samples, skipped, stop, hold)
    if adapter is None:
        sys.exit(STOPPED)
    return adapter


def nothing_learned(job: Train, norm: float, skipped: int, folder: Path) -> str:
    """Why an adapter of such a norm is not saved, and the mend."""
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


def refuse_fewer(job: Train, step: int, folder: Path) -> None:
    """See that a run goes on from no step that is beyond its last.

    Raises:
        ValueError: it would.
    """
    if step > job.steps:
        raise ValueError(
            f"steps is {job.steps}, but run {job.run!r} is at step {step} already; set steps={step} or more, go on "
            f"from an older checkpoint in {folder / 'checkpoints'} with resume=step-..., or choose another name with "
            "run=..."
        )


def goes_on(job: Train, step: int, before: int) -> str:
    """What another number of steps means for a run that is at `step`."""
    said = f"note: steps was {before} and is {job.steps}"
    if job.optim.schedule == "constant":
        return f"{said}: the run ends as one that was asked for {job.steps} steps at once"
    was, now = (rate_at(job.optim, steps, step) for steps in (before, job.steps))
    return (
        f"{said}: optim.schedule={job.optim.schedule} falls to 0 at the last step, so at step {step} the rate goes "
        f"from {was:.2e} to {now:.2e}, that of a run of {job.steps} steps; the steps before were those of a run of "
        f"{before}"
    )


def train_on(
    job: Train,
    accelerator: Accelerator,
    folder: Path,
    samples: list[Sample],
    skipped: list[Skipped],
    stop: Stop,
    hold: Hold | None,
) -> Path | None:
    """The run, on the ranks that there are; None if it was stopped."""
    main, say = accelerator.is_main_process, accelerator.print
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if job.precision.kind == "auto":
        check_job(job, accelerator)  # deciding it measures the transformer
    if main:
        job.precision = decide(job.model, job.precision, accelerator.device, say)
    accelerator.wait_for_everyone()
    job.precision = decide(job.model, job.precision, accelerator.device, say)  # other ranks read what was measured
    (begun,) = gather_object([claim(job, folder, ranks)] if main else [])
    # after the config is compared: a run may go on on a card that lacks bf16
    job.precision = stored_on(job.precision, accelerator.device)
    check_half(job.precision)
    if shards() and job.precision.dtype == torch.float16:
        raise ValueError(
            "products in fp16 (precision.compute_dtype, or a card without bf16) need whole layers, and FSDP cuts them; "
            "use configs/accelerate/ddp.yaml"
        )
    check_shared(folder, rank)
    finished = folder / "adapter" / FILE
    if finished.is_file() and read_notes(finished).get("step") == job.steps:
        if job.resume is None:
            say(f"run {job.run!r} is finished: {finished}")
            if job.push is not None and main:
                say(f"pushed: {push(finished.parent, job.push)}")
            return finished.parent
        accelerator.wait_for_everyone()  # all have read it; it is not what the run now comes to
        for done in (folder / "adapter", folder / "adapter-ema") if main else ():
            if done.is_dir():
                shutil.rmtree(f"{done}.aside", ignore_errors=True)
                done.rename(f"{done}.aside")
    check_job(job, accelerator)
    if begun != ranks:
        say(
            f"note: the run began with {begun} processes and goes on with {ranks}: the samples of each update stay the "
            "same and in their order; figures may differ by rounding"
            + (f", and {ranks - begun} processes only repeat what others do" if ranks > begun else "")
        )
    (base,) = gather_object([fingerprint(job.model, "transformer")] if main else [])
    latest = find_checkpoint(folder / "checkpoints", job.resume, lambda _: None) if main else None
    if latest is not None:  # before any model is loaded
        state = read_checkpoint(latest)[2]
        refuse_other(state, None, base, folder)
        refuse_fewer(job, state["step"], folder)
        if (before := begun_steps(folder)) != job.steps:
            say(goes_on(job, state["step"], before))
            note_steps(folder, job.steps)
    elif main and finished.is_file() and job.resume is None:
        raise ValueError(
            f"{finished} is of another number of steps, and there is no checkpoint to go on from; choose another name "
            f"with run=..., or delete {folder} to start over"
        )
    if not job.model.random:
        path, config = job.model.path, read_config(job.model, "transformer")
        check_transformer(path, part_folder(job.model, "transformer"), config)
    if not read_config(job.model, "transformer").get("guidance_embeds"):
        say(
            f"note: {job.model.path} has no guidance embedding (schnell and its kin): an adapter trained on it undoes "
            "the few-step distillation with time; train few steps, or on FLUX.1-dev"
        )

    if not shards():
        announce(job, accelerator.device, say)
    # pictures and texts are encoded and their encoders freed before the transformer is loaded
    samples += prior_samples(job.data, job.model, job.precision, accelerator.device, rank, ranks)
    accelerator.wait_for_everyone()
    texts = list(dict.fromkeys([*all_texts(samples, job.data), *job.previews]))
    place = accelerator.device, rank, ranks, gather_object
    cache = build(job.data, samples, texts, job.model, job.precision, job.encode, *place)
    for one in skipped + cache.skipped:
        say(f"skipped: {one.name} {one.reason}")
    for text in cache.truncated:
        say(f"T5 does not see the end of {text!r}")
    samples = [samples[i] for i in cache.kept]
    check_left(job.data, samples, skipped + cache.skipped)
    chosen = choose(samples, cache, job.data, job.seed)
    say(f"{len(chosen.train)} pictures to train on, {len(chosen.validation)} held out; {len(texts)} texts")

    place_of_weights = torch.device("cpu") if shards() else hold_of(job.memory)
    transformer = load_transformer(job.model, job.precision, accelerator.device, place_of_weights).train()
    if job.adapter.recovery is not None:
        layers = load_recovery(transformer, job.adapter.recovery, job.model, job.precision)
        say(f"recovery adapter on {layers} layers")
    parameters = attach(transformer, job.adapter, job.seed, model=job.model)
    if job.adapter.init in FROM_ERROR:
        began(transformer)["default"] = start_from_error(transformer, job.model, job.adapter.init)
    start = began(transformer).get("default")
    say(f"adapter on {len(strengths(transformer))} layers, {sum(p.numel() for p in parameters):,} parameters")
    if shards():
        shard(transformer, parameters, job, accelerator.device, say)
    job.memory, stream = choose_path(transformer, job.memory, job.precision, accelerator.device, say, job.deterministic)
    # its backward reads beyond its bounds where a gradient is a slice (torch 2.11); the fast path gives it none
    torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
    previews = {prompt: cache.text(prompt) for prompt in job.previews}
    tracker = make_tracker(job.track if main else type(job.track)("none"), job.run, folder, asdict(job))
    try:
        parts = fit(
            job,
            accelerator,
            transformer,
            parameters,
            cache,
            chosen,
            stream,
            previews,
            job.sampling.size(own_size(job.model)),
            tracker,
            folder,
            base,
            begun,
            stop,
            hold,
        )
    except BaseException as error:
        tracker.fail(error)
        raise
    if parts is None:
        tracker.finish()
        say(f"stopped ({stop.asked or 'another process was asked to'}); its state is saved, the same command goes on")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return None
    now, average = parts.progress, parts.average

    norm = update_norm(transformer)
    if not 0 < norm < math.inf:  # NaN too
        raise ValueError(nothing_learned(job, norm, now.skipped, folder))
    learned = f"learned: adapter norm {norm:.3f}"
    for name, history in (("validation loss", now.validation), ("of the averaged weights", now.validation_ema)):
        if history:
            before, after = history["0"], history[str(job.steps)]
            learned += f", {name} {before:.4f} -> {after:.4f} ({100 * (after - before) / before:+.1f} %)"
    if now.skipped:
        learned += f"\n{now.skipped} updates were left out as not finite: {folder / 'events.jsonl'} names their samples"
    if main:
        notes = {
            "step": job.steps,
            # one that goes on from a start at the quantization error is itself of that kind
            "adapter": asdict(job.adapter) | ({} if start is None else {"init": start.init}),
            "precision": asdict(job.precision),
            "base": base,
            "trigger": job.data.trigger,
            "validation": now.validation,
        }
        forget_adapters(folder)
        if average is not None:
            with average.used():
                if start is not None:
                    save_start(start.here, folder / "adapter-ema")
                own = {"ema": job.ema, "validation": now.validation_ema}
                save_adapter(transformer, folder / "adapter-ema", notes | own)
        if start is not None:
            save_start(start.here, folder / "adapter")
        write_card(folder / "adapter", card_of(job, folder, now.validation))
        save_adapter(transformer, folder / "adapter", notes)
        record_adapters(folder)
        tracker.adapter(folder / "adapter", notes)
        if job.push is not None:
            say(f"pushed: {push(folder / 'adapter', job.push)}")
    tracker.finish()
    say(f"{learned}\nadapter: {finished}" + (f"\naveraged: {folder / 'adapter-ema' / FILE}" if average else ""))
    accelerator.wait_for_everyone()
    del transformer
    release(accelerator.device)
    accelerator.end_training()
    if parts.undrawn is not None:
        raise ValueError(f"the adapter is saved, but the last previews are not drawn: {parts.undrawn}")
    return finished.parent
