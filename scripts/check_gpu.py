"""The bundled checkpoint through every path that only a GPU takes, each against a CPU or the plain path.

    python scripts/check_gpu.py                                  # minutes, most of them compiling on the CPU
    python scripts/check_gpu.py --only nf4-streamed-dora spill   # some rows; --list names them
    python scripts/check_gpu.py --cpu --only nf4-fused-lora      # what of it a CPU can do

Each precision, on the plain, the fused and the streamed path, with LoRA, rsLoRA and DoRA: gradients, a short training,
the same resumed in its middle, its preview, and a comparison's pictures. Then mixtures, adapters that start from the
rounding error, recovery, merging, the optimizers, several resolutions, memory that runs out, and pytest's GPU tests;
with two GPUs and more, scripts/check_ranks.py too. Rows of one precision share a process, and processes run side by
side. What the programs themselves say goes to a log beside the rows. The last lines are a table; the exit code is 4 if
a figure is beyond its limit or a row failed.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from infer.adapter.attach import attach, load_recovery
from infer.adapter.attached import adapter_state, set_adapter_state
from infer.adapter.lora import FROM_ERROR, Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.device.allocator import prepare
from infer.device.device import release
from infer.fast import offload as offloading
from infer.fast.cuda_graph import Replay
from infer.fast.install import choose_path, hold_of
from infer.fast.memory import Memory
from infer.merge import merge
from infer.merging.settings import Merge
from infer.program.atomic import replace_file
from infer.program.errors import DIFFERS
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from infer.recover import recover
from infer.rounding.settings import Recover
from infer.sample.generate import Sampling
from scripts import bench_rows
from scripts.bench_rows import Row
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.loop.batch import Batch
from train.loop.micro_step import fit_budget, make_learner
from train.loop.spill import FULL, USUAL, Spill
from train.objective.optim import NAMES, Optim
from train.run.config import Train
from train.train import train

MODEL = Model(str(ROOT / "scripts" / "tiny" / "model"))
PROMPTS = ["a large red star in the middle on a sky background"]
STEPS, MIDDLE = 4, 2
TOKENS = 40  # of the bundled model's T5
ROW = 240  # seconds after which a row is given up
LORA, NF4 = Adapter(rank=16), Precision("nf4")  # 8-bit optimizers leave tensors below 4,096 values in fp32

THREE = {r"single_transformer_blocks\.1\..*": "int8", r"transformer_blocks\.0\..*": "bf16"}
PRECISIONS = {
    "fp32": Precision("fp32"),
    "bf16": Precision("bf16"),
    "int8": Precision("int8"),
    "fp4": Precision("fp4"),
    "nf4": NF4,
    "nested": Precision("nf4", double_quant=True),
    "mixture": Precision("nf4", layers=THREE),  # blocks of three kinds
    "recovery": NF4,
}  # fmt: skip
PATHS = {"plain": Memory("nothing", fused=False), "fused": Memory(), "streamed": Memory(budget_gib=4.0)}
KINDS = {
    "lora": LORA,
    "rslora": replace(LORA, rslora=True),
    "dora": replace(LORA, dora=True),
    "residual": replace(LORA, init="residual"),
    "loftq": replace(LORA, init="loftq"),
}
FEW = {"mixture": ["lora", "dora"], "recovery": ["lora"], "nf4": list(KINDS)}  # else the first three

# figures: the largest relative error, or for decibels the least. bf16 is rounded at other places on each path
GRADIENT, LOSS, LEARNED, PICTURE = 0.02, 0.02, 0.15, 35.0
Figures = dict[str, tuple[float, str, float]]  # value, <= or >=, limit


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    precision: str
    path: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.precision}-{self.path}-{self.kind}"

    @property
    def plain(self) -> "Case":
        return replace(self, path="plain")

    def memory(self, device: torch.device) -> Memory:
        memory = replace(PATHS[self.path])
        if device.type == "cpu" and memory.fused:  # compiled it takes minutes
            memory.compile = memory.graph = False
        return memory

    def adapter(self) -> Adapter:
        recovery = recovery_path() if self.precision == "recovery" else None
        return replace(KINDS[self.kind], recovery=recovery)

    def job(self, device: torch.device) -> Train:
        # measuring is one more form to compile, which the optimizers' rows do
        how = PRECISIONS[self.precision], self.memory(device)
        return training(self.name, self.adapter(), device, *how, validation=0.0)


def training(
    run: str, adapter: Adapter, device: torch.device, precision: Precision = NF4, memory: Memory | None = None,
    resolution: Any = 128, validation: float = 0.2, **options: Any,
) -> Train:  # fmt: skip
    defaults: dict[str, Any] = {"steps": STEPS, "previews": PROMPTS, "optim": Optim(lr=1e-3)}
    if memory is None:
        memory = Memory() if device.type == "cuda" else Memory(compile=False, graph=False)
    return Train(
        model=MODEL,
        precision=replace(precision),
        adapter=adapter,
        data=Data("pictures", resolution, 2, validation=validation, cache=f"cache-{os.getpid()}"),
        memory=memory,
        sampling=Sampling(steps=2),
        run=run,
        accumulation=2,
        save_every=MIDDLE,
        validate_every=0,
        validation_levels=2 if validation else Train().validation_levels,
        device=device.type,
        **defaults | options,
    )


CASES = {
    case.name: case
    for precision in PRECISIONS
    for kind in FEW.get(precision, list(KINDS)[:3])
    for case in (Case(precision, path, kind) for path in PATHS)
}


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    a, b = (torch.cat([each.double().cpu().flatten() for each in part]) for part in (found, expected))
    return float((a - b).norm() / b.norm())


def decibels(found: Image.Image, expected: Image.Image) -> float:
    """PSNR of a picture against another; 99 where they are equal."""
    a, b = (np.asarray(each.convert("RGB"), dtype=np.float64) / 255 for each in (found, expected))
    error = float(np.square(a - b).mean())
    return min(99.0, -10 * math.log10(error)) if error else 99.0


def make_batch(config: Any, device: torch.device) -> Batch:
    """Of the training's shapes, which are then compiled once for both."""
    noise = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(device)

    x0, other = (normal(2, config.in_channels // 4, 16, 16) for _ in range(2))
    t5, pooled = normal(2, TOKENS, config.joint_attention_dim), normal(2, config.pooled_projection_dim)
    sigma = torch.tensor([0.3, 0.8], device=device)
    return Batch(x0, other, sigma, t5, pooled, None, torch.full((2,), 0.5, device=device))


def gradients(case: Case, precision: Precision, memory: Memory, device: torch.device, state: Any) -> tuple[Any, Any]:
    """The adapter's state and its gradients; state: None makes one that is not all zeros."""
    transformer = load_transformer(MODEL, precision, device, hold_of(memory)).train()
    adapter = case.adapter()
    if adapter.recovery is not None:
        load_recovery(transformer, adapter.recovery, MODEL, NF4)
    parameters = attach(transformer, adapter, 0)
    if state is None:
        noise = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
        state = adapter_state(transformer)
    else:
        set_adapter_state(transformer, state)
    job = replace(case.job(device), precision=precision, accumulation=1)
    job.memory, stream = choose_path(transformer, memory, precision, device, print)
    torch.backends.cuda.enable_cudnn_sdp(job.memory.fused)
    accelerator: Any = SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    learn = make_learner(job, accelerator, transformer, parameters, stream)
    batch = make_batch(transformer.config, device)
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
def truth(precision: str, kind: str) -> tuple[Any, list[Tensor]]:
    """The same rounded weights multiplied in fp32 on a CPU by diffusers' and PEFT's own layers."""
    case, own = Case(precision, "plain", kind), PRECISIONS[precision]
    exact = replace(own, compute_dtype="fp32") if own.quantized else Precision("fp32")
    state, found = gradients(case, exact, PATHS["plain"], torch.device("cpu"), None)
    return state, found


def losses(run: str) -> list[float]:
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def learned(run: str) -> dict[str, Tensor]:
    return load_file(Path("runs", run, "adapter", "pytorch_lora_weights.safetensors"))


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far two adapters are apart, of what was learned (B began as zeros)."""
    assert found.keys() == expected.keys()
    moved = sum(float(value.square().sum()) for key, value in expected.items() if "lora_B" in key)
    return math.sqrt(sum(float((found[key] - expected[key]).square().sum()) for key in found) / moved)


def resumed(job: Train) -> float:
    """The same training taken up again in its middle: the largest difference of any value."""
    straight = learned(job.run)
    train(replace(job, resume=f"step-{MIDDLE:06d}", previews=[], precision=replace(job.precision)))
    again = learned(job.run)
    return max(float((straight[key].double() - again[key].double()).abs().max()) for key in straight)


def pictures(run: str, model: Model, precision: Precision, memory: Memory, device: torch.device,
             adapter: str | None, recovery: str | None = None) -> list[Image.Image]:  # fmt: skip
    """A comparison's pictures, of the base and of the adapter."""
    folder = compare(
        Compare(
            model,
            {"own": replace(precision)},
            adapter=Trained(adapter),
            recovery={} if recovery is None else {"own": recovery},
            prompts=PROMPTS,
            sampling=Sampling(steps=4),
            memory=memory,
            run=run,
            device=device.type,
        )
    )
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [Image.open(folder / row["image"]).convert("RGB") for row in rows]


def nearness(found: list[Image.Image], expected: list[Image.Image]) -> float:
    """Decibels of the worst of some pictures."""
    return min(decibels(a, b) for a, b in zip(found, expected, strict=True))


def check_case(case: Case, device: torch.device) -> Figures:
    """Gradients, training, resuming, preview and pictures of one precision, path and kind of adapter."""
    figures: Figures = {}
    precision, memory, adapter = PRECISIONS[case.precision], case.memory(device), case.adapter()
    if adapter.init == "default":
        state, exact = truth(case.precision, case.kind)
        _, found = gradients(case, precision, memory, device, state)
        # PEFT rounds DoRA's norms to bf16; of FP4 a CPU rounds the 0.08 % that lie in the middle to the other side
        loose = 3 if case.kind == "dora" and case.path == "plain" else 1.5 if case.precision == "fp4" else 1
        figures["gradient against fp32 on a CPU"] = relative(found, exact), "<=", loose * GRADIENT
    job = case.job(device)
    train(job)
    figures["resumed, largest difference"] = resumed(job), "<=", 0.0
    trained = Path("runs", case.plain.name, "adapter")
    if not trained.is_dir():
        raise ValueError(f"the row {case.plain.name} has to come before: it trains what is compared")
    streamed_loftq = adapter.init == "loftq" and memory.budget_gib is not None
    shown = partial(pictures, model=MODEL, precision=precision, adapter=str(trained), recovery=adapter.recovery)
    if not streamed_loftq:  # refused
        drawn = shown(f"{case.name}-pictures", memory=memory, device=device)
        if case.path == "plain":
            if device.type == "cuda":
                cpu = torch.device("cpu")
                own = shown(f"{case.name}-cpu", memory=PATHS["plain"], device=cpu)
                figures["pictures against a CPU's, dB"] = nearness(drawn, own), ">=", PICTURE
        else:
            plain = [Image.open(file).convert("RGB") for file in picture_files(case.plain)]
            figures["pictures against the plain path's, dB"] = nearness(drawn, plain), ">=", PICTURE
    fused = replace(case, path="fused")
    # else it starts from what is computed where the weights are, on a CPU
    same = adapter.init == "default" and not adapter.dora
    if same and case.path == "streamed" and Path("runs", fused.name, "adapter").is_dir():
        figures["learned against the fused path's"] = apart(learned(case.name), learned(fused.name)), "<=", 0.0
    if case.path != "plain":
        a, b = losses(case.name)[:STEPS], losses(case.plain.name)[:STEPS]
        figures["loss against the plain path's"] = max(abs(x - y) / y for x, y in zip(a, b, strict=True)), "<=", LOSS
        if adapter.init == "default":
            figures["learned against the plain path's"] = (
                apart(learned(case.name), learned(case.plain.name)),
                "<=",
                LEARNED,
            )
        sheets = [
            Image.open(Path("runs", each.name, "previews", f"step-{STEPS:06d}.png")) for each in (case, case.plain)
        ]
        figures["preview against the plain path's, dB"] = decibels(*sheets), ">=", PICTURE
    return figures


def picture_files(case: Case) -> list[Path]:
    folder = Path("runs", f"{case.name}-pictures", "compare")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [folder / row["image"] for row in rows]


@cache
def recovery_path() -> str:
    folder = Path("runs/recover/adapter")
    if not folder.is_dir():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # of one rank everywhere: each other one is compiled by itself
        few: dict[str, Any] = {"sampling": Sampling(steps=2), "rows": 512, "share": 1.0, "most": 8, "polish": 2}
        recover(
            Recover(MODEL, NF4, prompts=PROMPTS, held_out=["four pink diamonds"], run="recover", device=device, **few)
        )
    return str(folder)


def check_recovery(device: torch.device) -> Figures:
    """How much of the rounding error an adapter gives back."""
    folder = Path(recovery_path()).parent
    return {"gap closed": (json.loads((folder / "recovery.json").read_text())["gap_closed"], ">=", 0.05)}


def check_merge(device: torch.device) -> Figures:
    """Merged on the GPU and on a CPU; then drawn on each path from the quantized files."""
    job = training("merge-adapter", LORA, device, previews=[])
    train(job)
    adapter = Trained("runs/merge-adapter/adapter")
    stored = []
    for where in dict.fromkeys([device.type, "cpu"]):
        out = Path(f"merged-{where}")
        merge(Merge(MODEL, NF4, adapter, str(out), PROMPTS, Sampling(steps=2), device=where))
        files = sorted((out / "transformer").glob("*.safetensors"))
        stored.append({key: value for file in files for key, value in load_file(file).items()})
    there = stored[-1]
    differ = sum(int((a.view(torch.uint8) != there[key].view(torch.uint8)).sum()) for key, a in stored[0].items())
    total = sum(value.numel() * value.element_size() for value in there.values())
    figures: Figures = {"bytes that differ from a CPU's": (differ / total, "<=", 1e-3)}
    drawn = {}
    for path, memory in PATHS.items():
        if memory.budget_gib is None or device.type == "cuda":
            memory = Case("nf4", path, "lora").memory(device)
            drawn[path] = pictures(f"merged-{path}", Model(f"merged-{device.type}"), NF4, memory, device, None)
    for path in list(drawn)[1:]:
        figures[f"{path} pictures against the plain path's, dB"] = nearness(drawn[path], drawn["plain"]), ">=", PICTURE
    return figures


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within, accelerate takes a CPU, whatever it took before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def check_optimizer(name: str, device: torch.device) -> Figures:
    """A training with an optimizer, resumed; against a CPU's, or for paged states against those that are not."""
    optim = Optim(name, lr=1.0 if name == "prodigy" else 1e-3)
    job = training(f"optimizer-{name}", LORA, device, optim=optim, previews=[])
    train(job)
    other = "optimizer-adamw8bit"
    if name != "paged_adamw8bit":
        other = f"optimizer-{name}-cpu"
        with on_cpu():
            train(training(other, LORA, torch.device("cpu"), optim=optim, previews=[]))
    figures: Figures = {"learned against a CPU's": (apart(learned(job.run), learned(other)), "<=", 2 * LEARNED)}
    figures["resumed, largest difference"] = resumed(job), "<=", 0.0
    return figures


def check_budget(name: str, device: torch.device) -> Figures:
    """Training with an optimizer's true states stays within a budget that some of the blocks fit."""
    adapter, optim = Adapter(rank=256, alpha=256.0), Optim(name, lr=1.0 if name == "prodigy" else 1e-3)
    job = training(f"budget-{name}", adapter, device, NF4, Memory(budget_gib=4.0), optim=optim, previews=[])
    whole, budgets = offloading.Offload.fit, []

    def fit(self: Any, _: float, work: Callable[[], object]) -> int:
        self.set_resident(0)
        budgets.append(self._taken(work) + self.host_bytes // 2)
        resident = whole(self, budgets[0] / 2**30, work)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return resident

    setattr(offloading.Offload, "fit", fit)  # noqa: B010 - the types differ in a name
    try:
        train(job)
    finally:
        setattr(offloading.Offload, "fit", whole)  # noqa: B010
    return {"of the budget, held": (torch.cuda.max_memory_reserved(device) / budgets[0], "<=", 1.0)}


def check_stays(device: torch.device) -> Figures:
    """A budget in which all blocks stay on the device: nothing is copied while a step is captured."""
    found = []
    for name, memory in (
        ("fused", Memory()),
        ("all-stay", Memory(budget_gib=8.0)),
        ("three-streamed", Memory(budget_gib=8.0)),
    ):
        blocks = {"all-stay": 0, "three-streamed": 3}.get(name)
        job = training(f"stays-{name}", LORA, device, Precision("bf16"), memory, validation=0.0, previews=[])
        with streamed(blocks):
            train(job)
        found.append(learned(job.run))
    return {
        f"{name}, apart": (apart(other, found[0]), "<=", 0.0)
        for name, other in zip(("all", "three"), found[1:], strict=True)
    }


def check_resolutions(device: torch.device) -> Figures:
    """Pictures of three sizes in one training."""
    runs = {}
    for path in ("plain", "fused"):
        memory = Case("nf4", path, "lora").memory(device)
        runs[path] = training(f"resolutions-{path}", LORA, device, NF4, memory, [128, 96, 160], steps=12, previews=[])
        train(runs[path])
    a, b = (losses(f"resolutions-{path}") for path in ("fused", "plain"))
    return {"loss against the plain path's": (max(abs(x - y) / y for x, y in zip(a, b, strict=True)), "<=", LOSS)}


def check_spill(device: torch.device) -> Figures:
    """A full card whose steps become slow is noticed; slow steps beside free memory, and a full card alone, are not."""
    total = torch.cuda.get_device_properties(device).total_memory
    said = {}
    for name, full, slow in (("full and slow", True, 1.0), ("slow", False, 1.0), ("full", True, 0.1)):
        held = (
            torch.empty(
                int((FULL + 0.01) * total) - torch.cuda.memory_reserved(device), dtype=torch.uint8, device=device
            )
            if full
            else None
        )
        spill = Spill(device)
        told = [spill.note(seconds) for seconds in [0.1] * USUAL + [slow] * 4]
        said[name] = sum(each is not None for each in told)
        del held
        torch.cuda.empty_cache()
    return {f"warnings when {name}": (abs(count - (name == "full and slow")), "<=", 0) for name, count in said.items()}


def check_short(device: torch.device) -> Figures:
    """An ordinary call that finds no memory beside captured ones has theirs."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    replay = Replay(lambda x: (x[:, None] * x[None, :]).sum(1))
    torch.cuda.set_per_process_memory_fraction(1.6 * 2**30 / total)  # each call takes 1 GiB
    try:
        noise = torch.Generator(device).manual_seed(0)
        errors = []
        for size in (16384, 16384, 16384, 16000, 16000):
            x = torch.randn(size, generator=noise, device=device)
            errors.append(relative([replay(x)], [x * x.sum()]))
    finally:
        replay.release()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"error": (max(errors), "<=", 1e-2)}


def outside(command: list[str], device: torch.device) -> Figures:
    """A program of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return {"exit code": (float(code), "<=", 0.0)}


def gpu_tests() -> list[str]:
    """pytest's own, of the files that hold any."""
    mark = 'reason="needs a GPU"'
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if mark in file.read_text())
    return [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", *files]


WORK: dict[str, Callable[[torch.device], Figures]] = {name: partial(check_case, case) for name, case in CASES.items()}
WORK |= {f"optimizer-{name}": partial(check_optimizer, name) for name in NAMES}
WORK |= {
    "recover": check_recovery,
    "merge": check_merge,
    "resolutions": check_resolutions,
    "all-stay": check_stays,
    **{f"budget-{name}": partial(check_budget, name) for name in NAMES},
    "short-of-memory": check_short,
    "pytest": partial(outside, gpu_tests()),
    "ranks": partial(outside, [sys.executable, str(ROOT / "scripts" / "check_ranks.py"), "--seconds", str(ROW - 30)]),
    "spill": check_spill,
}
ALONE = ("ranks", "spill")  # these need the whole card, or all of them
GPU_ONLY = ("all-stay", "budget", "short", "pytest", "ranks", "spill")


def possible(name: str, cpu: bool) -> bool:
    if cpu:
        return "streamed" not in name and not name.startswith(GPU_ONLY)
    return name != "ranks" or torch.cuda.device_count() > 1


def groups(names: list[str]) -> list[list[str]]:
    """Rows that share a process, and so what is compiled for them; plain before what is compared with it."""
    found: dict[str, list[str]] = {}
    for name in names:
        key = CASES[name].precision if name in CASES else name.split("-")[0]
        key = {"merge": "resolutions", "all": "bf16", "short": "budget", "recover": "recovery"}.get(key, key)
        if name in CASES and CASES[name].kind in FROM_ERROR:
            key = "from error"
        elif name in CASES and KINDS[CASES[name].kind].dora:
            key += " dora"  # compiled apart
        found.setdefault(key, []).append(name)
    return list(found.values())


@contextmanager
def streamed(blocks: int | None) -> Iterator[None]:
    """Within, so many blocks are offloaded whatever a budget allows, of None half of them."""
    whole = offloading.residents

    def few(sizes: list[int], room: int) -> int:
        return len(sizes) - (len(sizes) // 2 if blocks is None else blocks)

    offloading.residents = few
    try:
        yield
    finally:
        offloading.residents = whole


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Within, a row that takes longer fails; 0: it may take what it takes."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"the row was not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(name: str, device: torch.device) -> Row:
    """One row's figures and seconds."""
    start = time.perf_counter()
    with limited(ROW if device.type == "cuda" else 0), streamed(None):
        figures = WORK[name](device)
    release(device)
    return {"figures": {key: list(value) for key, value in figures.items()}, "seconds": time.perf_counter() - start}


def tell(name: str, seen: Path, where: TextIO = sys.stdout) -> None:
    """Print a row that is done."""
    line = next(line for line in reversed(bench_rows.read_lines(seen)) if line["variant"] == name)
    print(table([row_of(line)]), file=where, flush=True)


def worker(names: list[str], out: Path, device: torch.device) -> None:
    folder = out.parent
    os.chdir(folder)
    table_of = os.fdopen(os.dup(1), "w")
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in names:
        print(f"\n==== {name}", flush=True)
        fit = bench_rows.attempt(name, out, device, partial(check, name, device))
        tell(name, out, table_of)
        if not fit:
            sys.exit(1)


def share(value: float, sign: str, limit: float) -> float:
    """A figure as a part of its limit: up to 1 is within it."""
    if sign == ">=":
        return limit / value if value > 0 else 1e9
    return value / limit if limit else (0.0 if value == 0 else 1e9)


def row_of(line: Row) -> Row:
    """What is recorded of a row: the worst of its figures as a part of its limit."""
    more: Row = (
        {"figures": line["figures"], "seconds": round(line["seconds"], 1)}
        if "figures" in line
        else {"error": line["error"]}
    )
    worst = max((share(*figure) for figure in line["figures"].values()), default=0.0) if "figures" in line else None
    return bench_rows.make_row(f"gpu {line['variant']}", "of its limit", worst, "<= 1", line, **more)


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        name = row["name"].removeprefix("gpu ")
        if row["measured"] is None:
            lines.append(f"{name:24} FAILED    {row['error'].splitlines()[0][:200]}")
            continue
        said = ", ".join(
            f"{key} {value:.3g} ({sign} {limit:g})" for key, (value, sign, limit) in row["figures"].items()
        )
        verdict = "ok     " if row["measured"] <= 1 else "DIFFERS"
        lines.append(f"{name:24} {verdict} {row['seconds']:5.0f} s  {said}")
    return "\n".join(lines)


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORK), metavar="ROW", help="these rows; --list names them")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--cpu", action="store_true", help="what of it a CPU can do")
    parser.add_argument("--rows", type=Path, default=Path("runs/bench/check-gpu.jsonl"), help="where the rows go")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.out, torch.device("cpu" if options.cpu else "cuda"))
        return
    names = [name for name in WORK if possible(name, options.cpu) and (options.only is None or name in options.only)]
    if options.list:
        print("\n".join(names))
        return
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("error: this checks a GPU, and torch sees none; --cpu does what a CPU can")
    start, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="check-gpu-"))
    seen, log = folder / "seen.jsonl", folder / "log"
    seen.touch()
    log.touch()
    make_style(folder / "pictures", 12, 0)
    os.environ |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4", "HF_HUB_OFFLINE": "1"}
    flags = ["--cpu"] if options.cpu else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was seen is still told
    try:
        side = groups([name for name in names if name not in ALONE])
        run = partial(bench_rows.run_workers, Path(__file__).resolve(), out=seen, seconds=600, flags=flags)
        if side:  # a process compiles with few threads, and waits for the device
            run(side, needs=[1.0] * len(side), space=1.5 * len(os.sched_getaffinity(0)))
        for name in (name for name in names if name in ALONE):
            device = torch.device("cuda")
            bench_rows.attempt(name, seen, device, partial(check, name, device))
            tell(name, seen)
    finally:
        rows = finish(names, seen, log, options.rows)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{time.perf_counter() - start:.0f} s; {options.rows}")
    sys.exit(DIFFERS if any(bench_rows.met(row) != "yes" for row in rows) else 0)


def finish(names: list[str], seen: Path, log: Path, file: Path) -> list[Row]:
    """Keep the rows and the log, and print the table."""
    found = {line["variant"]: line for line in bench_rows.read_lines(seen)}
    absent = {"error": "the check ended before this row", **bench_rows.circumstances(torch.device("cpu"))}
    rows = [row_of(found.get(name, {"variant": name, **absent})) for name in names]
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(log, file.with_suffix(".log"))
    replace_file(file, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    right = sum(bench_rows.met(row) == "yes" for row in rows)
    print(f"\n{table(rows)}\n{right} of {len(rows)} rows hold")
    return rows


if __name__ == "__main__":
    main()
