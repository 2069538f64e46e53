"""Whether this checkpoint, device and launch support what the settings ask for: checked before anything is loaded.

What a config names (files, layers, device) is looked up earlier, before torch is imported: train/run/names.py."""

from accelerate import Accelerator

from infer.adapter.checks import check_precision, check_trained_guidance, check_training, shift_of
from infer.adapter.error_init import read_start
from infer.adapter.lora import FROM_ERROR
from infer.adapter.second import second_model
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.fast.memory import Memory
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


def check_preserving(job: Train) -> None:
    """Raises:
    ValueError: outputs are to be preserved, and the base without the adapter is not what the adapter begins with.
    """
    if job.preserve.kind == "none":
        return
    origin = None
    if job.adapter.init in FROM_ERROR:
        origin = f"adapter.init is {job.adapter.init}"
    elif job.adapter.start is not None:
        start = read_start(job.adapter.start, lambda layer: None)
        origin = None if start is None else f"adapter.start {job.adapter.start} is of init={start.init}"
    if origin is not None:
        raise ValueError(
            f"preserve={job.preserve.kind} keeps what the base draws without the adapter, and {origin}, which gives "
            "back what the base lost in rounding and would be unlearned; set preserve=none, or train with "
            "adapter.init=default"
        )


def check_supported(job: Train, accelerator: Accelerator) -> Memory:
    """See that the run can do what its settings ask for; returns the memory settings as they can be met.

    Raises:
        ValueError: it cannot, for a reason that is known before anything is loaded.
    """
    check_flow(job.model, job.flow)
    if job.sampling.model is not None:
        second = second_model(job.model, job.sampling.model)
        check_precision(second, job.precision, linear_shapes(read_config(second, "transformer")))
        if uses_fsdp():
            raise ValueError(
                "sampling.model loads a second checkpoint on one rank, and FSDP draws with all of them; set "
                "sampling.model=null"
            )
    if job.scores_every and uses_fsdp():
        raise ValueError("scores_every draws on one rank, and FSDP draws with all of them; set scores_every=0")
    graphs(job, accelerator)
    check_preserving(job)
    memory = check_training(job.model, job.precision, job.adapter, job.memory, accelerator.device)
    if uses_fsdp() and job.adapter.start is not None and read_start(job.adapter.start, lambda layer: None) is not None:
        raise ValueError(
            f"adapter.start {job.adapter.start} starts from a quantization error and needs whole layers; launch "
            "without FSDP"
        )
    return memory
