"""What a run decides before anything is loaded: its precision, whether it is finished, and where it goes on from."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from infer.adapter.model_card import push
from infer.adapter.read import FILE, read_notes
from infer.checkpoint.files import part_folder, read_config
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.headers import check_transformer
from infer.family.find import of_config
from infer.fast.kernel_calls import Use
from infer.fast.ready_kernels import prepare_kernels
from infer.program.paths import SHIPPED
from infer.quantize.compute import stored_on
from infer.rounding.layer_errors import decide
from train.estimate.auto import rooms, settle
from train.estimate.plan import announce, write_plan
from train.loop.preview import preview_size
from train.loop.session import Resumption, Run
from train.loop.supported import check_supported
from train.objective.optim import rate_at
from train.ranks.launch import check_shared_folder, from_main, uses_fsdp
from train.run.config import Train, check_half
from train.state.checkpoint import Checkpoint, find_checkpoint
from train.state.identity import check_steps, record_config, record_steps, recorded_steps
from train.state.progress import check_same_run

BUNDLED = SHIPPED / "scripts" / "tiny" / "model"


def begin(run: Run) -> Path | Resumption:
    """Settle the run's config and folder, and have its kernels compiled meanwhile; returns the adapter's folder if the
    run is finished, or how it goes on.

    Raises:
        ValueError: the run cannot be, or cannot go on.
    """
    settle_precision(run)
    original_ranks = from_main(run.accelerator, lambda: record_config(run.job, run.folder, run.ranks))
    settle_compute_dtype(run)
    check_shared_folder(run.folder, run.rank)
    finished = finished_adapter(run)
    if finished is not None:
        return finished
    possible = check_supported(run.job, run.accelerator)
    if original_ranks != run.ranks:
        run.say(ranks_note(original_ranks, run.ranks))
    base = from_main(run.accelerator, lambda: fingerprint(run.job.model, "transformer"))
    found = read_resumed(run, base) if run.main else None
    path = from_main(run.accelerator, lambda: None if found is None else found[0])
    check_base(run)
    fast = possible.fused and not uses_fsdp()
    settle_memory(run, fast, resumed=path is not None)
    if fast:
        job = run.job
        use = Use(job.adapter.rank, learns=True, dora=job.adapter.dora, repeatable=job.deterministic)
        prepare_kernels(read_config(job.model, "transformer"), job.precision, job.memory, run.device, use)
    if not uses_fsdp():
        if run.main and run.job.precision.kind != "auto":
            write_plan(run.job, run.folder / "plan.json")
        announce(run.job, run.device, run.say)
    return Resumption(original_ranks, base, path, None if found is None else found[1])


def settle_precision(run: Run) -> None:
    """Replace precision.kind=auto by the mixture of precisions that is measured, on the main rank, or remembered."""
    job = run.job
    if job.precision.kind == "auto":
        check_supported(job, run.accelerator)  # before the transformer is measured
    if run.main:
        job.precision = decide(job.model, job.precision, run.device, run.say)
    run.accelerator.wait_for_everyone()
    job.precision = decide(job.model, job.precision, run.device, run.say)  # other ranks read what was measured


def settle_compute_dtype(run: Run) -> None:
    """Replace bf16 by fp16 on a device that lacks it. It comes after the config is recorded: the run may go on on
    another device.

    Raises:
        ValueError: the run cannot be trained with products in fp16.
    """
    job = run.job
    job.precision = stored_on(job.precision, run.device)
    check_half(job.precision)
    if uses_fsdp() and job.precision.dtype == torch.float16:
        raise ValueError(
            "products in fp16 (precision.compute_dtype, or a card without bf16) need whole layers, and FSDP cuts them; "
            "use configs/accelerate/ddp.yaml"
        )


def settle_memory(run: Run, fast: bool, resumed: bool) -> None:
    """Replace memory.keep=auto by what the main rank decides for its card; fast: on the fast path."""
    found = None
    if fast and run.device.type == "cuda":
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(run.device))
        height, width = (0, 0) if run.job.previews == [] else preview_size(run.job)
        found = rooms(total, free, height * width)
    run.job.memory = from_main(run.accelerator, lambda: settle(run.job, run.folder, resumed, found, run.say))


def finished_adapter(run: Run) -> Path | None:
    """The adapter's folder if the run is finished. If `resume` asks to go on from a checkpoint all the same, the
    adapters are set aside."""
    job, file = run.job, run.folder / "adapter" / FILE
    if not file.is_file():
        return None
    notes = read_notes(file)
    ended = notes.get("ended") and notes.get("asked") == job.steps and notes.get("stop") == asdict(job.stop)
    if notes.get("step") != job.steps and not ended:
        return None
    if job.resume is None:
        run.say(f"run {job.run!r} is finished: {file}")
        if job.push is not None and run.main:
            run.say(f"pushed: {push(file.parent, job.push)}")
        return file.parent
    run.accelerator.wait_for_everyone()  # all ranks have read it
    if run.main:
        for folder in (run.folder / "adapter", run.folder / "adapter-ema"):
            if folder.is_dir():
                shutil.rmtree(f"{folder}.aside", ignore_errors=True)
                folder.rename(f"{folder}.aside")
    return None


def read_resumed(run: Run, base: str) -> tuple[Path, Checkpoint] | None:
    """Read the checkpoint from which the run goes on, once; None if there is none. Call on the main rank.

    Raises:
        ValueError: it was trained on another base model, or is beyond the last step; or there is none, and the adapter
            of another number of steps is in the way.
    """
    job, folder = run.job, run.folder
    found = find_checkpoint(folder / "checkpoints", job.resume, run.say)
    if found is not None:
        step = found[1].state["step"]
        check_same_run(found[1].state, None, base, folder)
        check_steps(job, step, folder)
        if (before := recorded_steps(folder)) != job.steps:
            run.say(steps_note(job, step, before))
            record_steps(folder, job.steps)
        return found
    file = folder / "adapter" / FILE
    if file.is_file() and job.resume is None:
        raise ValueError(
            f"{file} is of another number of steps, and there is no checkpoint to go on from; choose another name "
            f"with run=..., or delete {folder} to start over"
        )
    return None


def steps_note(job: Train, step: int, before: int) -> str:
    """What another number of steps than before means for a run that is at `step`."""
    said = f"note: steps was {before} and is {job.steps}"
    if job.optim.schedule == "constant":
        return f"{said}: the run ends as one that was asked for {job.steps} steps at once"
    was, now = (rate_at(job.optim, steps, step) for steps in (before, job.steps))
    return (
        f"{said}: optim.schedule={job.optim.schedule} falls to 0 at the last step, so at step {step} the rate goes "
        f"from {was:.2e} to {now:.2e}, that of a run of {job.steps} steps; the steps before were those of a run of "
        f"{before}"
    )


def ranks_note(original_ranks: int, ranks: int) -> str:
    """What another number of processes than before means for a run."""
    said = (
        f"note: the run began with {original_ranks} processes and goes on with {ranks}: the samples of each update "
        "stay the same and in their order; figures may differ by rounding"
    )
    return said + (
        f", and {ranks - original_ranks} processes only repeat what others do" if ranks > original_ranks else ""
    )


def check_base(run: Run) -> None:
    """See that the checkpoint's files are a transformer's, and note if it has no guidance embedding.

    Raises:
        ValueError: a file is not what the config says.
    """
    model = run.job.model
    config = read_config(model, "transformer")
    if Path(model.path) == BUNDLED and Path(run.job.data.path).name != "demo-pictures":
        run.say(
            "note: the bundled model knows coloured shapes on plain grounds alone: pictures of anything else teach it "
            "colours and textures at best. That training works shows the loss of the held-out pictures, which falls; "
            "for your own pictures take model=dev (docs/bundled-model.md)"
        )
    if not model.random and model.file is None:
        check_transformer(model.path, part_folder(model, "transformer"), config)
    note = of_config(config).training_note(config)
    if note is not None:
        run.say(f"note: {model.path} {note}")
