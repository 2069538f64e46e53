"""Products in fp16 (infer/fast/half.py) on a newer card that is taken for one without bf16: gradients, losses, memory.

    python scripts/check_half.py             # FLUX.1-dev's full size with random NF4 weights, then the bundled model
    python scripts/check_half.py --tiny      # the bundled model alone, on a CPU too

Every operation is looked at while a step runs uncompiled, and every graph that is compiled: none may hold a bf16
tensor. Kernels are those that a T4 has: memory-efficient attention, and products of cuBLAS. Activations beyond fp16's
range are put in on purpose, by the norms' scales.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device import allocator
from infer.device.allocator import prepare
from infer.device.device import release
from infer.fast import install as fast
from infer.fast.half import compute_in_half
from infer.fast.install import Memory, choose_path, hold_of, uninstall
from infer.program.paths import ROOT
from infer.quantize import compute
from infer.quantize.multiply import dequantize_to
from infer.quantize.precision import Precision, linear_layers
from infer.sample.encode import decode, text_encoder
from infer.sample.generate import Sampling, draw
from scripts import bench_rows
from scripts.bench_rows import Row, make_row
from scripts.bench_train import make_batch
from scripts.bench_variants import Variant
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.loop import run as training
from train.loop.micro_step import make_learner
from train.objective.optim import Optim
from train.run.config import Train
from train.train import train

FP16 = Precision("nf4", compute_dtype="fp16")
GIB = 2**30


class NoBf16(TorchDispatchMode):
    """Refuses every operation that reads or gives a bf16 tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, found)):
            assert not isinstance(value, Tensor) or value.dtype != torch.bfloat16, f"{function} has a bf16 tensor"
        return found


@contextmanager
def forbidden() -> Iterator[list[int]]:
    """Within, the card is taken for one without bf16, and no compiled graph may hold a bf16 tensor; gives the number of
    values that were looked at."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    seen = [0]

    def inner(graph: Any, *args: Any, **kwargs: Any) -> Any:
        for node in graph.graph.nodes:
            for value in tree_leaves(node.meta.get("val")):
                seen[0] += 1
                assert getattr(value, "dtype", None) != torch.bfloat16, f"{node} is compiled in bf16"
        return compile_fx_inner(graph, *args, **kwargs)

    own = compute._bf16_on_card, fast.BACKEND
    compute._bf16_on_card = lambda device: False  # type: ignore[assignment]
    fast.BACKEND = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[assignment]
    try:
        yield seen
    finally:
        compute._bf16_on_card, fast.BACKEND = own


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


def bundled(row: Callable[..., None], device: torch.device, steps: int) -> None:
    """Losses by step, bf16 and fp16, of real runs; and the pictures of both."""
    folder = Path("runs/check-half-pictures")
    if not (folder / "metadata.jsonl").is_file():
        make_style(folder, 36, 0)
    model, series, pictures = Model(str(ROOT / "scripts" / "tiny" / "model")), {}, {}
    memory = Memory(compile=False if device.type == "cuda" else None, graph=False if device.type == "cuda" else None)
    fit = training.fit

    def watched(*args: Any, **kwargs: Any) -> Any:
        with NoBf16():
            return fit(*args, **kwargs)

    for name, precision in (("fp32", Precision("nf4", "fp32")), ("bf16", Precision("nf4")), ("fp16", FP16)):
        half = name == "fp16"
        training.fit = watched if half else fit
        with forbidden() if half else nullcontext():
            job = Train(
                model=model,
                precision=precision,
                adapter=Adapter(rank=8, alpha=8.0),
                data=Data(path=str(folder), resolution=128, batch_size=4, cache=f"runs/check-half-cache-{name}"),
                optim=Optim(lr=1e-3),
                memory=Memory(compile=False if device.type == "cuda" else None),
                steps=steps,
                validate_every=0,
                save_every=0,
                run=f"check-half-{name}",
                previews=[],
                device=device.type,
            )
            train(job)
            lines = [json.loads(line) for line in Path("runs", job.run, "metrics.jsonl").read_text().splitlines()]
            series[name] = torch.tensor([line["loss"] for line in lines if "loss" in line])
            print(name, [round(line["validation_loss"], 4) for line in lines if "validation_loss" in line], flush=True)
            with text_encoder(model, precision, device, None) as encoder:
                (text,) = encoder(["a red star"])
            transformer = load_transformer(model, precision, device)
            choose_path(transformer, memory, precision, device, print)
            with NoBf16() if half else nullcontext():
                latents = draw(transformer, load_scheduler(model), text, 0, Sampling(20, 3.5), (128, 128), device)
            assert latents.isfinite().all()
            pictures[name] = latents.float().cpu()
    training.fit = fit
    for name in ("bf16", "fp16"):
        apart = float(((series[name] - series["fp32"]).abs() / series["fp32"]).mean())
        row(f"loss curve of {steps} steps, {name}, mean distance from fp32", "", apart, "<= 0.02")
        apart = relative([pictures[name]], [pictures["fp32"]])
        row(f"latents after 20 steps of drawing, {name} against fp32", "", apart, "<= 0.1")


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/half.jsonl"))
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    if not options.tiny and device.type != "cuda":
        sys.exit("error: the full size needs a GPU, and torch sees none; give --tiny")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    source: Row = bench_rows.circumstances(device)
    missed = []

    def row(name: str, unit: str, measured: float, target: str | None) -> None:
        one = make_row(name, unit, measured, target, source)
        bench_rows.append(options.out, one)
        print(bench_rows.table([one]).splitlines()[-1], flush=True)
        if bench_rows.met(one) == "no":
            missed.append(name)

    begun = time.perf_counter()
    if options.tiny:
        bundled(row, device, options.steps)
    else:
        for part in (
            lambda: full_size(row, accelerator),
            lambda: parts(row, device),
            lambda: bundled(row, device, options.steps),
            lambda: streamed(row, accelerator),
        ):
            try:
                part()
            except Exception:  # the other parts are to be seen too
                traceback.print_exc()
                missed.append("a part")
            release(device)
            print(f"   {time.perf_counter() - begun:.0f} s", flush=True)
    if missed:
        sys.exit(4)


if __name__ == "__main__":
    main()
