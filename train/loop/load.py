"""Load what a run trains with: encoded pictures and texts first, then the quantized transformer with its adapter."""

from dataclasses import replace

import torch
from accelerate.utils import gather_object

from infer.adapter.attach import attach, began, load_recovery, strengths
from infer.adapter.error_init import start_from_error
from infer.adapter.lora import FROM_ERROR
from infer.checkpoint.load import load_transformer
from infer.fast.install import choose_path, hold_of
from train.data.buckets import is_smaller
from train.data.caption import all_texts
from train.data.samples import check_left
from train.data.source import Sample, Skipped
from train.estimate.memory import references_of
from train.latents.build import build
from train.latents.prior import prior_samples
from train.latents.prune import folders_used
from train.latents.users import record_use
from train.loop.batch import split_samples
from train.loop.preview import texts_of_previews
from train.loop.second import empty_text
from train.loop.session import EncodedData, LoadedModel, Run
from train.objective.preservation import preserved_text
from train.ranks.launch import shard_weights, uses_fsdp


def encode(run: Run, samples: list[Sample], skipped: list[Skipped]) -> EncodedData:
    """Encode pictures and texts into the cache, and free the encoders, before the transformer is loaded.

    samples, skipped: as `read_samples` found them; the pictures of prior preservation are added.

    Raises:
        ValueError: too few samples are left to train on.
    """
    job, accelerator = run.job, run.accelerator
    here = run.device, run.rank, run.ranks
    samples += prior_samples(job.data, job.model, job.precision, *here)
    accelerator.wait_for_everyone()
    empty = [""] if (job.previews != [] or job.edits) and empty_text(job) else []
    learned = all_texts(samples, job.data)
    kept = []
    if job.preserve.kind != "none":
        kept = [preserved_text(text, job.preserve, job.data.trigger) for text in learned]
        run.say(f"output preservation: {learned[0]!r} is learned, {kept[0]!r} stays as the base draws it")
    apart = job.unrelated if job.scores_every else []
    asked = [*(job.previews or []), *(edit.prompt for edit in job.edits), *apart]
    texts = list(dict.fromkeys([*learned, *kept, *asked, *empty]))
    cache = build(job.data, samples, texts, job.model, job.precision, job.encode, *here, gather_object)
    for one in skipped + cache.skipped:
        run.say(f"skipped: {one.name} {one.reason}")
    for text in cache.truncated:
        run.say(f"the text encoder does not see the end of {text!r}")
    samples = [samples[i] for i in cache.kept]
    check_left(job.data, samples, skipped + cache.skipped)
    chosen = split_samples(samples, cache, job.data, job.seed)
    small = sum(is_smaller(p.width, p.height, cache.views(i), job.data) for i, p in enumerate(cache.pictures))
    if small:
        run.say(
            f"note: {small} of {len(samples)} pictures are smaller than data.resolution={job.data.resolution} and are "
            "trained at their own size; data.upscale=true enlarges them, a lower data.resolution fits them"
        )
    if run.main:
        record_use(cache, run.folder, folders_used(job.data, job.model, job.precision))
    run.say(f"{len(chosen.train)} pictures to train on, {len(chosen.validation)} held out; {len(texts)} texts")
    behind = max((len(sample.references) for sample in samples), default=0)
    if behind:
        count = sum(bool(sample.references) for sample in samples)
        run.say(f"{count} of {len(samples)} pictures have references, {behind} at most")
    if behind and behind > references_of(job):
        run.say(
            f"note: the plan counts {references_of(job)} references a sample; the {behind} that the data itself names "
            "take more memory and time"
        )
    previews, edits = texts_of_previews(job, chosen, cache, run.device)
    against = cache.text("") if empty else None
    drawn = {name: replace(text, empty=against) for name, text in previews.items()}
    unrelated = {prompt: replace(cache.text(prompt), empty=against) for prompt in apart}
    return EncodedData(cache, chosen, drawn, edits, unrelated)


def load_model(run: Run) -> LoadedModel:
    """Load the quantized transformer, attach the adapter, and choose the fast or the plain path."""
    job, device = run.job, run.device
    weights_on = torch.device("cpu") if uses_fsdp() else hold_of(job.memory)
    transformer = load_transformer(job.model, job.precision, device, weights_on).train()
    if job.adapter.recovery is not None:
        layers = load_recovery(transformer, job.adapter.recovery, job.model, job.precision)
        run.say(f"recovery adapter on {layers} layers")
    parameters = attach(transformer, job.adapter, job.seed, model=job.model)
    if job.adapter.init in FROM_ERROR:
        began(transformer)["default"] = start_from_error(transformer, job.model, job.adapter.init)
    start = began(transformer).get("default")
    run.say(f"adapter on {len(strengths(transformer))} layers, {sum(p.numel() for p in parameters):,} parameters")
    if uses_fsdp():
        shard_weights(transformer, parameters, job, device, run.say)
    job.memory, offload = choose_path(transformer, job.memory, job.precision, device, run.say, job.deterministic)
    # its backward pass reads beyond its bounds if a gradient is a slice (torch 2.11); the fast path makes no slices
    torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
    return LoadedModel(transformer, parameters, start, offload)
