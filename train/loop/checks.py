"""What the settings of a training run ask of each other, of the checkpoint and of adapter files, before anything is
loaded."""

from accelerate import Accelerator

from infer.adapter.checks import check_guidance, check_training, shift_of
from infer.adapter.error_init import read_start
from infer.checkpoint.load import Model
from infer.program.no_effect import refuse_idle
from train.loop.micro_step import graphs
from train.objective.flow_matching import Flow
from train.ranks.launch import shards
from train.run.config import Train


def check_flow(model: Model, flow: Flow) -> None:
    """Raises:
    ValueError: the density or the guidance is not one that this checkpoint has.
    """
    check_guidance(model, {"flow.guidance": (flow.guidance, Flow().guidance)})
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


def check_job(job: Train, accelerator: Accelerator) -> None:
    """Raises:
    ValueError: the run cannot be, for any reason that is known before something is loaded.
    """
    if not job.data.validation:
        reason = "data.validation=0 holds no pictures out"
        refuse_idle(job, "", ("keep_best", "validation_levels"), reason)
    check_flow(job.model, job.flow)
    check_guidance(job.model, {"sampling.guidance": (job.sampling.guidance, type(job.sampling)().guidance)})
    graphs(job, accelerator)
    check_training(job.model, job.precision, job.adapter, job.memory, accelerator.device)
    if shards() and job.adapter.start is not None and read_start(job.adapter.start, lambda layer: None) is not None:
        raise ValueError(
            f"adapter.start {job.adapter.start} starts from a quantization error and needs whole layers; launch "
            "without FSDP"
        )
