"""The adapter's gradients of one batch, of a case and of what it is compared with."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from infer.adapter.attach import attach, load_recovery
from infer.adapter.attached import adapter_state, set_adapter_state
from infer.checkpoint.load import load_transformer
from infer.fast.install import choose_path, hold_of
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from scripts.check.case import KLEIN, NF4, PATHS, TRAINED, Case
from scripts.check.recovery import recovery_of
from train.loop.batch import Batch
from train.loop.micro_step import fit_budget, make_learner

CPU = torch.device("cpu")
TOKENS = {"": 40, KLEIN: 512, TRAINED: 48}  # that the model's texts have


def make_batch(config: Any, tokens: int, device: torch.device) -> Batch:
    """Of the training's shapes, which are then compiled once for both."""
    noise = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(device)

    x0, other = (normal(2, config.in_channels // 4, 16, 16) for _ in range(2))
    embeds = normal(2, tokens, config.joint_attention_dim)
    wide = getattr(config, "pooled_projection_dim", None)
    sigma = torch.tensor([0.3, 0.8], device=device)
    pooled = None if wide is None else normal(2, wide)
    return Batch(x0, other, sigma, embeds, pooled, None, torch.full((2,), 0.5, device=device))


def gradients(case: Case, precision: Precision, memory: Memory, device: torch.device, state: Any) -> tuple[Any, Any]:
    """The adapter's state and its gradients; state: None makes one that is not all zeros."""
    model, recovery = case.checkpoint, recovery_of(case)
    transformer = load_transformer(model, precision, device, hold_of(memory)).train()
    if recovery is not None:
        load_recovery(transformer, recovery, model, NF4)
    parameters = attach(transformer, case.adapter(recovery), 0)
    if state is None:
        noise = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
        state = adapter_state(transformer)
    else:
        set_adapter_state(transformer, state)
    job = replace(case.job(device, recovery), precision=precision, accumulation=1)
    job.memory, stream = choose_path(transformer, memory, precision, device, print)
    torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
    accelerator: Any = SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    learn = make_learner(job, accelerator, transformer, parameters, stream)
    batch = make_batch(transformer.config, TOKENS[case.model], device)
    if stream is not None:
        fit_budget(job, learn, parameters, torch.optim.AdamW(parameters), stream, batch)
    for _ in range(3):  # ordinary, captured, and as it was captured
        for parameter in parameters:
            parameter.grad = None
        learn(batch)
    found = [parameter.grad.clone().cpu() for parameter in parameters if parameter.grad is not None]
    assert len(found) == len(parameters), "a part of the adapter has no gradient"
    return state, found


@cache
def truth(model: str, precision: str, kind: str) -> tuple[Any, list[Tensor]]:
    """The same rounded weights multiplied in fp32 on a CPU by diffusers' and PEFT's own layers."""
    case = Case(precision, "plain", kind, model)
    exact = replace(case.numbers, compute_dtype="fp32") if case.numbers.quantized else Precision("fp32")
    state, found = gradients(case, exact, PATHS["plain"], CPU, None)
    return state, found


@cache
def on_a_cpu(model: str, precision: str, kind: str) -> list[Tensor]:
    """The same products in 8 bits by a CPU, which rounds each value as a GPU does."""
    case = Case(precision, "fused", kind, model)
    state, _ = truth(model, precision, kind)
    _, found = gradients(case, case.numbers, case.memory(CPU), CPU, state)
    return list(found)
