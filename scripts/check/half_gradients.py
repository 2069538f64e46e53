"""Gradients in fp16 at FLUX.1-dev's full size, against fp32 from the same stored weights; seconds and memory."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from infer.adapter.attach import attach
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device import allocator
from infer.device.device import release
from infer.fast.half import compute_in_half
from infer.fast.install import Memory, choose_path, hold_of, uninstall
from infer.quantize.multiply import dequantize_to
from infer.quantize.precision import Precision, linear_layers
from infer.sample.encode import decode, text_encoder
from scripts.bench_train import make_batch
from scripts.bench_variants import Variant
from scripts.check.no_bf16 import NoBf16, forbidden
from train.loop.micro_step import make_learner

FP16 = Precision("nf4", compute_dtype="fp16")
GIB = 2**30


def make_loud(transformer: nn.Module, by: float) -> None:
    """Have every block's norms give activations so much larger, as a few channels of FLUX's are."""
    for name, layer in linear_layers(transformer).items():
        if "blocks" in name and name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear")):
            for scale in layer.bias.data.chunk(6 if "norm1" in name else 3)[1::3]:
                scale += by


def compute_plainly(transformer: Any, dtype: torch.dtype) -> None:
    """The same stored weights, with products in another dtype and no scaled rows."""
    for layer in linear_layers(transformer).values():
        layer.__dict__.pop("forward", None)
    transformer.__dict__.pop("_in_half", None)
    transformer._compute_dtype = dtype
    dequantize_to(transformer, dtype)


def compute_again_in_half(transformer: Any) -> None:
    dequantize_to(transformer, torch.float16)
    compute_in_half(transformer, llm_int8=False)
    for name, layer in linear_layers(transformer).items():
        if ".lora_" in name:  # attached since it was loaded
            layer.__dict__.pop("forward", None)


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    x, y = (torch.cat([each.double().flatten() for each in part]) for part in (a, b))
    return float((x - y).norm() / y.norm())


def noisy(parameters: list[nn.Parameter]) -> None:
    """B starts as zero, and then A has no gradient."""
    noise = torch.Generator(parameters[0].device).manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise, device=parameter.device)


def full_size(row: Callable[..., None], accelerator: Accelerator) -> None:
    """Gradients of every path against products in fp32, from the same stored weights."""
    device = accelerator.device
    job = Variant(FP16, 512).job
    with forbidden() as looked:
        transformer: Any = load_transformer(job.model, Precision("nf4"), device).train()
    parameters = attach(transformer, job.adapter, job.seed)
    noisy(parameters)
    batch = make_batch(Variant(FP16, 512), transformer.config, device)

    def gradients(memory: Memory, times: int = 1, watch: bool = False) -> list[Tensor]:
        uninstall(transformer)
        job.memory, _ = choose_path(transformer, memory, FP16, device, print)
        learn = make_learner(job, accelerator, transformer, parameters, None)
        for _ in range(times):
            for parameter in parameters:
                parameter.grad = None
            with NoBf16() if watch else nullcontext():
                loss = learn(batch)
        found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        assert len(found) == len(parameters)
        print("   loss", loss.tolist(), flush=True)
        return found

    eager = Memory("attention", compile=False, graph=False)
    for by in (0.0, 1e4, 1e6):
        make_loud(transformer, by)
        compute_plainly(transformer, torch.float32)
        exact = gradients(eager)
        compute_plainly(transformer, torch.bfloat16)
        wide = relative(gradients(eager), exact)
        row(f"gradients, bf16 against fp32, norms' scales + {by:g}", "", wide, None)
        compute_again_in_half(transformer)
        with forbidden() as looked:
            paths = {"uncompiled, no bf16 tensor": (eager, 1, True)}
            if by == 1e4:
                paths["PEFT's layers, no bf16 tensor"] = (Memory("nothing", fused=False), 1, True)
            if by != 1e6:
                paths["compiled and captured"] = (Memory("attention"), 3, False)
            for name, (memory, times, watch) in paths.items():
                if not memory.fused:
                    transformer.enable_gradient_checkpointing()
                found = relative(gradients(memory, times, watch), exact)
                transformer.disable_gradient_checkpointing()
                row(f"gradients, fp16 {name}, against fp32, norms' scales + {by:g}", "", found, f"<= {wide:.4f}")
            if by == 0:
                row("values of compiled graphs that were looked at for bf16", "", float(looked[0]), ">= 100")
        make_loud(transformer, -by)
    del exact
    for size in (512, 1024):
        for keep in ("attention", "nothing"):
            uninstall(transformer)
            memory = Memory(keep)
            job.memory, _ = choose_path(transformer, memory, FP16, device, print)
            learn = make_learner(job, accelerator, transformer, parameters, None)
            large = make_batch(Variant(FP16, size), transformer.config, device)
            release(device)
            allocator.reset_peak(device)
            for _ in range(3):
                learn(large).tolist()
            start = time.perf_counter()
            for _ in range(4):
                learn(large).tolist()
            row(f"seconds a micro-step, fp16, {size}, keep={keep}", "s", (time.perf_counter() - start) / 4, None)
            row(f"peak reserved, fp16, {size}, keep={keep}", "GiB", allocator.peak_reserved(device) / GIB, None)
            del learn


def streamed(row: Callable[..., None], accelerator: Accelerator) -> None:
    """The same gradient, with most blocks in host memory, within 5 GiB."""
    device, found = accelerator.device, []
    for budget in (None, 5.0):
        job = Variant(FP16, 512, Memory("nothing", budget_gib=budget)).job
        with forbidden():
            transformer: Any = load_transformer(job.model, FP16, device, hold_of(job.memory)).train()
            parameters = attach(transformer, job.adapter, job.seed)
            for parameter in parameters:
                parameter.data = parameter.data.to(device)
            noisy(parameters)
            job.memory, stream = choose_path(transformer, job.memory, FP16, device, print)
            batch = make_batch(Variant(FP16, 512), transformer.config, device)
            learn = make_learner(job, accelerator, transformer, parameters, stream)
            if stream is not None:

                def work(learn: Any = learn, batch: Any = batch, parameters: Any = parameters) -> None:
                    learn(batch)
                    for parameter in parameters:
                        parameter.grad = None

                print("   resident", stream.fit(5.0, work), flush=True)
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = None
                learn(batch)
            found.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
        del transformer, parameters, learn, stream
        release(device)
    # the backward pass of memory-efficient attention adds in any order
    row("gradients, fp16 resident, once more", "", relative(found[2], found[1]), None)
    row("gradients, fp16 streamed within 5 GiB, against resident", "", relative(found[5], found[2]), "<= 0.001")


def parts(row: Callable[..., None], device: torch.device) -> None:
    """T5 in NF4 and the autoencoder, at full size: what they take, and that what they give is finite."""
    model = Model("black-forest-labs/FLUX.1-dev", weights="random")
    with forbidden():
        release(device)
        allocator.reset_peak(device)
        with text_encoder(model, Precision("nf4"), device, 512) as encoder, NoBf16():
            (text,) = encoder(["a red fox in deep snow"])
            row(
                "text encoders, NF4 with fp16 products, peak reserved",
                "GiB",
                allocator.peak_reserved(device) / GIB,
                None,
            )
        assert text.embeds.isfinite().all() and text.embeds.dtype == torch.float16
        vae = load_vae(model, device)
        for side in (512, 1024):
            release(device)
            allocator.reset_peak(device)
            with NoBf16():
                decode(vae, torch.randn(1, (side // 16) ** 2, 64, device=device), side, side)
            row(
                f"autoencoder in fp32, decoding {side}, peak reserved",
                "GiB",
                allocator.peak_reserved(device) / GIB,
                None,
            )
