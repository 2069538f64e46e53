"""The text of a run's model card."""

from pathlib import Path

from infer.adapter.lora import FROM_ERROR
from infer.adapter.model_card import Card
from infer.checkpoint.family import distilled_to, pipeline_of
from infer.checkpoint.sources import rest_of
from train.loop.preview import samples_of
from train.run.config import Train


def card_of(job: Train, folder: Path, history: dict[str, float]) -> Card:
    """The adapter's model card, with the last previews cut out of their sheet as its samples."""
    adapter, optim = job.adapter, job.optim
    notes = []
    if adapter.recovery is not None:
        notes.append(
            "Trained beside a recovery adapter of the quantized base; right on the unquantized base without it."
        )
    if adapter.init in FROM_ERROR:
        notes.append(f"Starts from the error of the base in {job.precision.kind}: right on that base alone.")
    sheet = folder / "previews" / f"step-{job.steps:06d}.png"
    samples = samples_of(sheet, folder / "adapter") if sheet.is_file() else {}
    return Card(
        name=job.run,
        base=rest_of(job.model).path,
        pipeline=pipeline_of(job.model),
        trigger=job.data.trigger,
        precision=job.precision.kind,
        facts={
            "kind": f"{adapter.words()}, layers {adapter.targets}",
            "steps": f"{job.steps} of batch {job.data.batch_size} x {job.accumulation}, {optim.name} at {optim.lr:g}",
        },
        figures=history,
        samples=samples,
        notes=notes,
        few=distilled_to(job.model),
        kind=adapter.kind,
        place=job.push or str(folder / "adapter"),
    )
