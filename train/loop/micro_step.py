"""One micro-step: the objective of a batch and its gradient, plain or captured as a CUDA graph."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from infer.adapter.switch import without_adapter
from infer.fast.cuda_graph import Replay
from infer.fast.offload import Offload
from infer.quantize.compute import compute_dtype_of
from train.loop.batch import Batch, batch_of, tensors_of
from train.objective.flow_matching import Flow, distances, losses, noised, predict
from train.objective.optim import SCRATCH, state_sizes
from train.run.config import Train

WARM = 3  # the call of a shape that compiles and captures nothing any more


def batch_velocity(transformer: Any, batch: Batch, job: Train, kept: bool = False) -> Tensor:
    """The velocity of each sample, [b, tokens, channels * 4], in fp32; kept: for the texts that are preserved."""
    embeds, pooled = (batch.kept_embeds, batch.kept_pooled) if kept else (batch.embeds, batch.pooled)
    assert embeds is not None, "the batch has texts to preserve"
    x = noised(batch.x0, batch.noise, batch.sigma)
    dtype = compute_dtype_of(transformer)
    # the fast path casts by itself; PEFT's layers, fp32 beside bf16, need autocast
    mixed = not job.memory.fused and dtype != torch.float32
    with torch.autocast(x.device.type, dtype, enabled=mixed):
        return predict(transformer, x, embeds, pooled, batch.sigma, job.flow.guidance, dtype, batch.references)


def batch_losses(transformer: Any, batch: Batch, job: Train, flow: Flow) -> Tensor:
    """The objective `flow` of each sample, [b], in fp32."""
    velocity = batch_velocity(transformer, batch, job)
    return losses(velocity, batch.x0, batch.noise, batch.sigma, flow, batch.mask)


def preserved_losses(transformer: Any, batch: Batch, job: Train, flow: Flow) -> Tensor:
    """How far each sample's prediction for the text that is preserved is from the base's own, [b], in fp32; of the
    whole picture, whatever its mask."""
    with torch.no_grad(), without_adapter(transformer):
        base = batch_velocity(transformer, batch, job, kept=True)
    return distances(batch_velocity(transformer, batch, job, kept=True), base, batch.sigma, flow)


def graphs(job: Train, accelerator: Accelerator) -> bool:
    """Whether micro-steps are captured as CUDA graphs.

    Raises:
        ValueError: memory.graph asks for it, and it is not possible.
    """
    wanted = job.memory.graph
    hindrance = None
    if accelerator.device.type != "cuda":
        hindrance = f"the device is {accelerator.device}"
    elif not job.memory.fused:
        hindrance = "memory.fused is false"
    if wanted and hindrance:
        raise ValueError(f"memory.graph=true captures CUDA steps, but {hindrance}; set it to false or null")
    # of several ranks too: gradients are exchanged between the replays
    return hindrance is None and wanted is not False


def preservation_cost(seconds: float, job: Train) -> str:
    """What output preservation takes of a micro-step of so many seconds: its share of the passes.

    A training pass costs 2 forward passes, up to 3 where blocks are computed again; preservation adds another one, and
    the base's forward pass.
    """
    passes = {"everything": 2.0, "products": 2.2, "attention": 2.6, "nothing": 3.0}[job.memory.keep]
    extra = (passes + 1) / (2 * passes + 1)
    return (
        f"output preservation takes about {extra * seconds:.2f} of {seconds:.2f} s of a micro-step (by its share of "
        "the passes through the transformer)"
    )


def _wait(device: torch.device) -> None:
    """Until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_learner(
    job: Train,
    accelerator: Accelerator,
    model: Any,
    parameters: list[nn.Parameter],
    offload: Offload | None,
    turns: int = 1,
) -> Callable[[Batch], Tensor]:
    """A function that adds a batch's gradient to the parameters' and returns each sample's loss, [b] on the device,
    that of output preservation included.

    It does not wait for the device. turns: into how many parts each batch is divided that this rank learns from one
    after another.
    """

    def backward(batch: Batch) -> Tensor:
        values = batch_losses(model, batch, job, job.flow)
        ((values * batch.weight).sum() / job.accumulation).backward()
        values = values.detach()
        if job.preserve.kind != "none":  # after that, so that no two passes' activations are held at once
            kept = job.preserve.weight * preserved_losses(model, batch, job, job.flow)
            ((kept * batch.weight).sum() / job.accumulation).backward()
            values = values + kept.detach()
        return values

    def isolated(*tensors: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """The losses and the gradients; the parameters' accumulated gradients stay as they are. It can be replayed."""
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            values = backward(batch_of(tensors))
            gradients = [parameter.grad for parameter in parameters]
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
        return values, gradients

    replay = Replay(isolated, offload) if graphs(job, accelerator) else None
    seen: Counter[tuple[torch.Size, ...]] = Counter()
    timed = job.preserve.kind == "none"

    def learn(batch: Batch) -> Tensor:
        nonlocal timed
        shape = batch.x0.shape
        form = shape, *(each.shape for each in batch.references)
        seen[form] += 1
        timing = not timed and seen[form] == WARM
        if timing:
            _wait(accelerator.device)
        start = time.perf_counter()
        if replay is None:
            values = backward(batch)
        else:
            replayed, gradients = replay(*tensors_of(batch))
            values = replayed.clone()  # the next replay overwrites them
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.clone() if job.accumulation * turns > 1 else gradient
                else:
                    parameter.grad += gradient
        if timing:
            timed = True
            _wait(accelerator.device)
            if accelerator.is_main_process:
                tqdm.write(preservation_cost(time.perf_counter() - start, job))
        if seen[form] == 1:
            values.tolist()  # waits for the device
            if job.memory.fused and job.memory.compiles(accelerator.device) and accelerator.is_main_process:
                pixels = f"{shape[0]} of {shape[3] * 8}x{shape[2] * 8} pixels"
                behind = [f"{each.shape[3] * 8}x{each.shape[2] * 8}" for each in batch.references]
                pixels += f" with references of {', '.join(behind)}" if behind else ""
                tqdm.write(f"first step with {pixels}: {time.perf_counter() - start:.1f} s, compilation included")
        return values

    return learn


def fit_budget(
    job: Train,
    learn: Callable[[Batch], object],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    offload: Offload,
    largest: Batch,
) -> int:
    """Keep as many blocks on the device as the budget allows beside a step on the largest batch; returns how many."""
    # the first update allocates the states, between what the first step has left free; a resumed run has them already.
    # Each tensor for itself, as optimizers do: small ones and large ones have memory of their own in torch's allocator
    name, device = job.optim.name, largest.x0.device
    absent = [] if optimizer.state else [size for each in parameters for size in state_sizes(name, each.numel())]

    def step() -> list[Tensor]:
        learn(largest)
        states = [torch.empty(size, dtype=torch.uint8, device=device) for size in absent]
        for parameter in parameters:
            scratch = [torch.empty_like(parameter) for _ in range(SCRATCH.get(name, 0))]
            del scratch
        for parameter in parameters:
            parameter.grad = None
        return states

    def work() -> None:
        states = step()
        if states:
            learn(largest)
            for parameter in parameters:
                parameter.grad = None
        del states

    assert job.memory.budget_gib is not None
    return offload.fit(job.memory.budget_gib, work)
