"""Whether what a training config names is there: looked up before torch is imported, to answer within two seconds.

Whether the checkpoint, the device and the launch support the settings is checked later: train/loop/supported.py."""

from pathlib import Path

from infer.adapter.checks import check_guidance
from infer.adapter.lora import FROM_ERROR
from infer.adapter.read import find_adapter, read_notes
from infer.adapter.second import check_same_start, second_model
from infer.adapter.sizes import match_adapter
from infer.checkpoint.family import distilled_from
from infer.checkpoint.files import read_config
from infer.checkpoint.headers import check_model
from infer.checkpoint.layers import linear_shapes
from infer.device.device import check_device_name
from infer.program.no_effect import refuse_idle
from infer.program.run_names import check_run_name
from infer.quantize.precision import check_layer_names
from infer.sample.edit import check_edits
from infer.score.judges import check_paths
from train.run.config import UNSCORED, Train


def check_names(job: Train) -> Path:
    """Look up what a config names: device, checkpoint, layers, the step to resume from and adapter files.

    Returns: the run's folder.

    Raises:
        ValueError: one of them is not there, or the run's name cannot be a folder's.
    """
    check_device_name(job.device)
    folder = check_run_name(job.run)
    check_model(job.model)
    check_distilled(job)
    check_effects(job)
    check_second(job)
    layers = linear_shapes(read_config(job.model, "transformer"))
    match_adapter(layers, job.adapter)
    check_layer_names(job.precision, layers)
    check_scores(job)
    check_edits(job.edits, job.model, job.data.teach_references)
    if job.mirror is None:  # which brings them back first
        check_resumed(job, folder)
    for path in (job.adapter.start, job.adapter.recovery):
        if path is not None:
            read_notes(find_adapter(path))
    return folder


def training_folder(job: Train) -> str | None:
    """The folder of the training pictures, which scores compare with; None where they are not in one folder here."""
    return job.data.path if job.data.path and Path(job.data.path).expanduser().is_dir() else None


def check_scores(job: Train) -> None:
    """See that networks are there, and what a run is to be ended by can be measured.

    Raises:
        ValueError: it cannot.
    """
    if job.stop.loss and not job.data.validation:
        raise ValueError(
            f"stop.loss is {job.stop.loss}, and data.validation=0 holds no pictures out; set data.validation=0.1, or "
            "stop.loss=0"
        )
    if not job.scores_every:
        refuse_idle(job.networks, "networks.", ("clip", "dino", "lpips", "image_reward"), UNSCORED)
        return
    check_paths(job.networks)
    judged = ["stop.likeness"] * bool(job.stop.likeness) + ["stop.copying"] * (job.stop.copying is not None)
    if judged and job.mirror is None and training_folder(job) is None:
        raise ValueError(
            f"{judged[0]} is set, and drawn pictures are compared with those of a folder: data.path is "
            f"{job.data.path!r}, which is none here; leave {judged[0]} out"
        )


def check_effects(job: Train) -> None:
    """Raises:
    ValueError: a setting has no effect on this checkpoint, or where nothing is held out.
    """
    if not job.data.validation:
        refuse_idle(job, "", ("keep_best", "validation_levels"), "data.validation=0 holds no pictures out")
    check_guidance(job.model, job.sampling.guidance)
    if job.data.prior.count:
        check_guidance(job.model, job.data.prior.guidance, "data.prior.guidance")


def check_resumed(job: Train, folder: Path) -> None:
    """Raises:
    ValueError: there is no checkpoint of the name that the run is to go on from.
    """
    checkpoints = folder / "checkpoints"
    if job.resume is not None and not (checkpoints / job.resume).is_dir():
        names = ", ".join(sorted(path.name for path in checkpoints.glob("step-*"))) or "none"
        raise ValueError(
            f"resume is {job.resume!r}, but the checkpoints in {checkpoints} are: {names}; choose one, or null"
        )


def check_second(job: Train) -> None:
    """See that sampling.model names a checkpoint that the adapter can be drawn on too.

    Raises:
        ValueError: it does not, or nothing would be drawn on it.
    """
    if job.sampling.model is None:
        return
    if job.previews == []:
        refuse_idle(job.sampling, "sampling.", ("model",), "previews=[] draws nothing")
    if job.adapter.init in FROM_ERROR:
        raise ValueError(
            f"adapter.init={job.adapter.init} starts from the rounding error of {job.model.path}, and sampling.model "
            "draws on another checkpoint; set sampling.model=null"
        )
    second_model(job.model, job.sampling.model)
    check_same_start([job.adapter.start] if job.adapter.start else [], job.adapter.recovery is not None)


def check_distilled(job: Train) -> None:
    """See that the checkpoint is one to train on.

    Raises:
        ValueError: it is distilled to few steps and `distilled` is not set, or it is set without effect.
    """
    base = distilled_from(job.model)
    if base is not None and not job.distilled:
        raise ValueError(
            f"{job.model.path} is distilled to draw in few steps, and adapters that are trained on it draw grey "
            f"pictures; train on its base (model.path={base}) and draw with either, or set distilled=true to train on "
            "it all the same"
        )
    if base is None and job.distilled:
        raise ValueError(f"distilled is true, but {job.model.path} is not distilled; leave it at false")
