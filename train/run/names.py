"""Whether what a training config names is there: looked up before torch is imported, to answer within two seconds.

Whether the checkpoint, the device and the launch support the settings is checked later: train/loop/supported.py."""

from pathlib import Path

from infer.adapter.read import find_adapter, read_notes
from infer.adapter.targets import match_targets
from infer.checkpoint.family import distilled_from
from infer.checkpoint.files import read_config
from infer.checkpoint.headers import check_model
from infer.checkpoint.layers import linear_shapes
from infer.device.device import check_device_name
from infer.program.command import check_run_name
from infer.quantize.precision import check_layer_names
from train.run.config import Train


def check_names(job: Train) -> Path:
    """Look up what a config names: device, checkpoint, layers, the step to resume from and adapter files.

    Returns: the run's folder.

    Raises:
        ValueError: one of them is not there, or the run's name cannot be a folder's.
    """
    check_device_name(job.device)
    folder = check_run_name(job.run)
    check_model(job.model)
    base = distilled_from(job.model)
    if base is not None and not job.distilled:
        raise ValueError(
            f"{job.model.path} is distilled to draw in few steps, and adapters that are trained on it draw grey "
            f"pictures; train on its base (model.path={base}) and draw with either, or set distilled=true to train on "
            "it all the same"
        )
    if base is None and job.distilled:
        raise ValueError(f"distilled is true, but {job.model.path} is not distilled; leave it at false")
    layers = linear_shapes(read_config(job.model, "transformer"))
    match_targets(layers, job.adapter.targets, job.adapter.rank)
    check_layer_names(job.precision, layers)
    checkpoints = folder / "checkpoints"
    if job.resume is not None and not (checkpoints / job.resume).is_dir():
        names = ", ".join(sorted(path.name for path in checkpoints.glob("step-*"))) or "none"
        raise ValueError(
            f"resume is {job.resume!r}, but the checkpoints in {checkpoints} are: {names}; choose one, or null"
        )
    for path in (job.adapter.start, job.adapter.recovery):
        if path is not None:
            read_notes(find_adapter(path))
    return folder
