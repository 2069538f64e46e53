"""Several processes on one run: which launches work, and what the ranks send to each other.

Every rank holds the whole adapter, a few megabytes, and the optimizer's state for it. Per update the ranks sum the
adapter's gradients once. Frozen weights are never sent, except under FSDP, where each rank stores a part of each block
and gathers the rest when it needs the block. A launch that cannot work is refused before anything is loaded.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from torch import nn

from infer.adapter.lora import FROM_ERROR
from infer.device.device import pick_device
from infer.fast.memory import NEEDS_FUSED
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import kind_of
from train.run.config import Train

T = TypeVar("T")
# The dtype in whose name FSDP 2 sends 4-bit codes. It copies with torch._foreach_copy_, which on a GPU takes narrower
# floats through fp32 and gives every NaN one pattern: of NF4 codes seen as bf16, 1 pair of bytes in 1,300 was lost
CODES = torch.float32
SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def uses_fsdp(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher asks for FSDP, which shards the frozen weights over the ranks."""
    return _is_set(environment, "ACCELERATE_USE_FSDP")


def uses_zero2(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher asks for DeepSpeed, which shards the optimizer's state over the ranks."""
    return _is_set(environment, "ACCELERATE_USE_DEEPSPEED")


def _check_zero(job: Train, environment: Mapping[str, str]) -> None:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage != "2":
        what = {
            "3": "it cuts packed 4-bit weights apart and saves empty adapters",
            "1": "ZeRO-2 does the same and more",
        }
        raise ValueError(
            f"accelerate was launched for DeepSpeed ZeRO-{stage}, which is not supported: "
            f"{what.get(stage, 'nothing is shared')}; use configs/accelerate/zero2.yaml, or fsdp2.yaml to share weights"
        )
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ValueError("a DeepSpeed config file is not read; take deepspeed_config_file out of accelerate's config")
    for name in ("OFFLOAD_OPTIMIZER", "OFFLOAD_PARAM"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_{name}_DEVICE", "none")
        if device != "none":
            raise ValueError(f"{name.lower()}_device is {device}, but an adapter has megabytes; set it to none")
    if job.optim.name != "adamw":
        raise ValueError(
            f"optim.name={job.optim.name} cannot be shared by ZeRO-2, which flattens the parameters that its state is "
            "for; use optim=adamw, or configs/accelerate/ddp.yaml"
        )


def check_launch(job: Train, environment: Mapping[str, str] = os.environ) -> None:
    """Compare what the launcher asks for, in its environment variables, with what works.

    Raises:
        ValueError: it cannot work; the message says why, and what works instead.
    """
    if uses_zero2(environment):
        _check_zero(job, environment)
    if not uses_fsdp(environment):
        return
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate was launched for FSDP {version}, which flattens packed weights and adapters into one tensor "
            "of one type; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"
        )
    for name, mend in (
        ("FSDP_OFFLOAD_PARAMS", "to keep weights in host memory use memory.budget_gib, without FSDP"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set it to false: memory.keep=nothing does that here"),
    ):
        if _is_set(environment, name):
            raise ValueError(f"accelerate was launched with {name.lower()}: true, which is not supported; {mend}")
    if job.precision.kind == "int8":
        raise ValueError(
            "precision.kind=int8 cannot be shared by FSDP: bitsandbytes keeps the scales on the weight itself, and "
            "they are lost when it is cut; use precision=nf4 or bf16, or configs/accelerate/ddp.yaml"
        )
    if job.precision.kind == "auto" or "int8" in job.precision.layers.values():
        raise ValueError(
            "a mixture of precisions with int8 layers cannot be shared by FSDP, which loses their scales; use "
            "precision=nf4 or bf16, or configs/accelerate/ddp.yaml"
        )
    if job.adapter.recovery is not None or job.adapter.init in FROM_ERROR:
        raise ValueError("adapter.recovery and adapter.init=residual or loftq need whole layers; launch without FSDP")
    if job.precision.products != "bf16":
        raise ValueError(
            f"precision.products={job.precision.products} needs the fast path, which holds a block's weights in one "
            "piece, and FSDP cuts them apart; set precision.products=bf16, or use configs/accelerate/ddp.yaml"
        )
    for name, none in NEEDS_FUSED.items():
        if getattr(job.memory, name):
            raise ValueError(
                f"memory.{name}={getattr(job.memory, name)} needs the fast path, which holds a block's weights in one "
                f"piece, and FSDP cuts them apart; set it to {none}, or use configs/accelerate/ddp.yaml"
            )


def make_accelerator(job: Train) -> Accelerator:
    """An accelerator without mixed precision: the loop casts by itself, so that previews and validation see the plain
    model.

    Raises:
        ValueError: the launcher's settings are not what the config asks for, or not supported.
    """
    wanted = None if job.device == "auto" else pick_device(job.device)
    if wanted is not None and wanted.index is not None:
        raise ValueError(f"device is {job.device!r}; set device=cuda and choose the card by CUDA_VISIBLE_DEVICES")
    check_launch(job)
    here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    on_cuda = torch.cuda.is_available() and not (wanted and wanted.type == "cpu")
    if on_cuda and here > cards and not _is_set(os.environ, "ACCELERATE_USE_CPU"):
        raise ValueError(
            f"{here} processes were launched on this machine, but torch sees {cards} CUDA devices; set num_processes "
            "(or --nproc_per_node) to the number of GPUs"
        )
    accelerator = Accelerator(
        cpu=wanted is not None and wanted.type == "cpu",
        mixed_precision="no",
        # rank 0 may encode a large data set while the others wait; train/ranks/peers.py notices a death meanwhile
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
    )
    if wanted is not None and accelerator.device.type != wanted.type:
        raise ValueError(
            f"accelerate was launched for {accelerator.device}, but device={job.device} asks for {wanted}; "
            "set device=auto to follow the launcher"
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"accelerate was launched for {accelerator.distributed_type.value}, which is not supported; use one "
            "process, data parallelism, FSDP 2 or ZeRO-2 (configs/accelerate)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate was launched with gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; "
            "set it to 1 there and use accumulation=... here"
        )
    return accelerator


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` returns on the main rank, on every rank."""
    (value,) = gather_object([make()] if accelerator.is_main_process else [])
    result: T = value
    return result


def check_shared_folder(folder: Path, rank: int) -> None:
    """Wait until this rank sees the config that rank 0 has written: a network file system may take seconds.

    Raises:
        ValueError: it does not see it within 30 seconds.
    """
    file, start = folder / "config.yaml", time.monotonic()
    while not file.is_file():
        if time.monotonic() - start > 30:
            raise ValueError(
                f"rank {rank} does not see {file.resolve()}, which rank 0 has written: start all machines in one "
                "folder that they share"
            )
        time.sleep(0.2)


def shard_weights(
    transformer: Any,
    parameters: Iterable[nn.Parameter],
    job: Train,
    device: torch.device,
    say: Callable[[str], object],
) -> None:
    """Shard every frozen weight over the ranks (FSDP 2), block by block; each rank keeps the whole adapter.

    4-bit scales stay whole too. Packed codes are cut as they are, viewed as CODES: before torch 2.12 FSDP 2 takes no
    weights of an integer type. It gathers each weight by itself, so the adapter may be of another type.
    `transformer` may be on the host.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if job.memory.fused:
        say("note: the fast path is off: it holds a block's weights in one piece, and FSDP cuts them apart")
    job.memory = replace(job.memory, keep="everything" if job.memory.keep == "everything" else "nothing", fused=False)
    if job.memory.keep == "nothing":
        transformer.enable_gradient_checkpointing()
    adapter = set(parameters)
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    transformer._compute_dtype = compute_dtype_of(transformer)  # CODES do not speak for it
    for module in transformer.modules():
        if kind_of(module) in ("nf4", "fp4"):
            layer: Any = module
            layer.quant_state = layer.weight.quant_state  # bitsandbytes takes it from here once the weight is gathered
            layer.quant_state.to(device)
            layer.weight.data = layer.weight.data.view(-1).view(CODES).view(-1, 1)
            layer.quant_storage = CODES
    cut: Any = partial(
        fully_shard, mesh=init_device_mesh(device.type, (torch.distributed.get_world_size(),)), ignored_params=adapter
    )
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        cut(block)
    cut(transformer)


def broadcast_adapter(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Give all ranks rank 0's adapter, since different hardware may draw different numbers."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each rank's gradients by their mean over the ranks, with one sum of one tensor."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients), "a part of the adapter has no gradient"
    flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    parts = flat.split([parameter.numel() for parameter in parameters])
    for gradient, part in zip(gradients, parts, strict=True):
        assert gradient is not None
        gradient.copy_(part.view_as(gradient))
