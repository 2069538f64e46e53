"""What a training config names, looked at before torch is imported: a mistake is answered within two seconds."""

from pathlib import Path

from infer.adapter.read import find_adapter, read_notes
from infer.adapter.targets import match_targets
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import check_model, read_config
from infer.device.device import check_device_name
from infer.program.command import check_run_name
from infer.quantize.precision import check_layer_names
from train.run.config import Train


def check_run(job: Train) -> Path:
    """The run's folder, once its name, the device, the checkpoint, the layers and the adapter's files are there.

    Raises:
        ValueError: one is not.
    """
    check_device_name(job.device)
    folder = check_run_name(job.run)
    check_model(job.model)
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
