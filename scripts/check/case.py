"""The matrix of what is checked: a model, a precision, a path of the blocks, and a kind of adapter."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.fast.memory import Memory
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling
from train.data.dataset import Data
from train.objective.optim import Optim
from train.run.config import Train

BUNDLED = Model(str(ROOT / "scripts" / "tiny" / "model"))
# tests/tiny_klein.py's, in the check's folder: random weights, long texts
KLEIN, DISTILLED = "klein", "klein-distilled"
TRAINED = "tiny-klein"  # the bundled one
CHECKPOINTS = {"": BUNDLED, KLEIN: Model(KLEIN), TRAINED: Model(str(ROOT / "scripts" / "tiny" / "klein"))}
PROMPTS = ["a large red star in the middle on a sky background"]
STEPS, MIDDLE = 4, 2
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
    # what is stored, and what it is multiplied as
    "bf16-fp8": Precision("bf16", products="fp8"),
    "nf4-fp8": Precision("nf4", products="fp8"),
    "nf4-int8": Precision("nf4", products="int8"),
    "int8-int8": Precision("int8", products="int8"),
}  # fmt: skip
PATHS = {"plain": Memory("nothing", fused=False), "fused": Memory(), "streamed": Memory(budget_gib=4.0)}
KINDS = {
    "lora": LORA,
    "rslora": replace(LORA, rslora=True),
    "dora": replace(LORA, dora=True),
    "residual": replace(LORA, init="residual"),
    "loftq": replace(LORA, init="loftq"),
}
THREE_KINDS, TWO_KINDS = ["lora", "rslora", "dora"], ["lora", "dora"]
MATRIX = {  # by model and precision: the adapters
    "": {
        **dict.fromkeys(("fp32", "bf16", "int8", "fp4", "nested"), THREE_KINDS),
        "nf4": list(KINDS),
        "mixture": TWO_KINDS,
        "recovery": ["lora"],
        "bf16-fp8": ["lora"],
        "nf4-fp8": TWO_KINDS,
        "nf4-int8": TWO_KINDS,
        "int8-int8": ["lora"],
    },
    KLEIN: {
        **dict.fromkeys(("bf16", "int8", "fp4", "nf4"), TWO_KINDS),
        "nf4-fp8": ["lora"],
        "nf4-int8": ["lora"],
    },
    TRAINED: {"bf16": ["lora"], "nf4": ["lora"]},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    precision: str
    path: str
    kind: str
    model: str = ""
    """Of CHECKPOINTS; empty for the bundled FLUX.1."""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model, self.precision, self.path, self.kind) if part)

    @property
    def plain(self) -> "Case":
        """The same by diffusers' and PEFT's own layers, which know no products in 8 bits."""
        return replace(self, path="plain")

    @property
    def checkpoint(self) -> Model:
        return replace(CHECKPOINTS[self.model])

    @property
    def numbers(self) -> Precision:
        own = PRECISIONS[self.precision]
        return replace(own, products="bf16" if self.path == "plain" else own.products)

    @property
    def eight(self) -> bool:
        """Whether products are in 8 bits."""
        return self.numbers.products != "bf16"

    def memory(self, device: torch.device) -> Memory:
        memory = replace(PATHS[self.path])
        if device.type == "cpu" and memory.fused:  # compiled it takes minutes
            memory.compile = memory.graph = False
        return memory

    def adapter(self, recovery: str | None = None) -> Adapter:
        return replace(KINDS[self.kind], recovery=recovery)

    def job(self, device: torch.device, recovery: str | None = None) -> Train:
        # measuring is one more form to compile, which the optimizers' rows do
        how = self.numbers, self.memory(device)
        adapter = self.adapter(recovery)
        # of 512 text tokens the attention's gradient is not the same every time, unless that is asked for
        own: dict[str, Any] = {"model": self.checkpoint, "deterministic": bool(self.model)}
        return training(self.name, adapter, device, *how, validation=0.0, **own)


CASES = {
    case.name: case
    for model, precisions in MATRIX.items()
    for precision, kinds in precisions.items()
    for kind in kinds
    for path in PATHS
    for case in (Case(precision, path, kind, model),)
    if case.eight or PRECISIONS[precision].products == "bf16"  # 8 bits have no plain path
}


def training(
    run: str, adapter: Adapter, device: torch.device, precision: Precision = NF4, memory: Memory | None = None,
    resolution: Any = 128, validation: float = 0.2, **options: Any,
) -> Train:  # fmt: skip
    """A training of a few steps, in the folder where the check works."""
    defaults: dict[str, Any] = {"steps": STEPS, "previews": PROMPTS, "sampling": Sampling(steps=2)}
    defaults |= {"optim": Optim(lr=1e-3), "model": replace(BUNDLED)}
    defaults["data"] = Data("pictures", resolution, 2, validation=validation, cache=f"cache-{os.getpid()}")
    if memory is None:
        memory = Memory() if device.type == "cuda" else Memory(compile=False, graph=False)
    return Train(
        precision=replace(precision),
        adapter=adapter,
        memory=memory,
        run=run,
        accumulation=2,
        save_every=MIDDLE,
        validate_every=0,
        validation_levels=2 if validation else Train().validation_levels,
        device=device.type,
        **defaults | options,
    )
