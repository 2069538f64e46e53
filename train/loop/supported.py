"""Whether this checkpoint, device and launch support what the settings ask for: checked before anything is loaded.

What a config names (files, layers, device) is looked up earlier, before torch is imported: train/run/names.py."""

from accelerate import Accelerator

from infer.adapter.checks import check_guidance, check_trained_guidance, check_training, shift_of
from infer.adapter.error_init import read_start
from infer.checkpoint.model import Model
from infer.program.no_effect import refuse_idle
from train.loop.micro_step import graphs
from train.objective.flow_matching import Flow
from train.ranks.launch import uses_fsdp
from train.run.config import Train


def check_flow(model: Model, flow: Flow) -> None:
    """See that the checkpoint supports the density and the guidance.

    Raises:
        ValueError: it does not.
    """
    check_trained_guidance(model, flow.guidance, Flow().guidance)
    if flow.density == "shifted":
        shift = shift_of(model)
        if shift is not None:
            said = (
                "does not shift its noise levels" if shift == 1 else f"shifts by {shift:g} whatever the picture's size"
            )
            raise ValueError(
                f"flow.density=shifted follows FLUX.1-dev's sampler, and that of {model.path} {said}; set "
                "flow.density=logit_normal (and flow.logit_mean, if the levels are to be higher)"
            )


def check_supported(job: Train, accelerator: Accelerator) -> None:
    """See that the run can do what its settings ask for.

    Raises:
        ValueError: it cannot, for a reason that is known before anything is loaded.
    """
    if not job.data.validation:
        reason = "data.validation=0 holds no pictures out"
        refuse_idle(job, "", ("keep_best", "validation_levels"), reason)
    check_flow(job.model, job.flow)
    check_guidance(job.model, job.sampling.guidance)
    if job.data.prior.count:
        check_guidance(job.model, job.data.prior.guidance, "data.prior.guidance")
    graphs(job, accelerator)
    check_training(job.model, job.precision, job.adapter, job.memory, accelerator.device)
    if uses_fsdp() and job.adapter.start is not None and read_start(job.adapter.start, lambda layer: None) is not None:
        raise ValueError(
            f"adapter.start {job.adapter.start} starts from a quantization error and needs whole layers; launch "
            "without FSDP"
        )
