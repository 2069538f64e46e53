"""The ways to take a training step that scripts/bench_train.py times, and what is asked of them."""

from dataclasses import dataclass, field, replace

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.fast.install import Memory
from infer.quantize.precision import Precision
from train.data.dataset import Data
from train.objective.optim import Optim
from train.run.config import Train

TEXT = 512  # text tokens


@dataclass
class Variant:
    """One way to take a training step."""

    precision: Precision
    resolution: int
    memory: Memory = field(default_factory=Memory)
    adapter: Adapter = field(default_factory=lambda: Adapter(rank=4, alpha=4.0))
    optim: str = "adamw"
    batch: int = 1
    reference: bool = False
    deterministic: bool = False
    model: str = "FLUX.1-dev"
    references: int = 0
    """Reference pictures of the same size behind the tokens of the picture."""

    @property
    def job(self) -> Train:
        return Train(
            model=Model(f"black-forest-labs/{self.model}", weights="random"),
            precision=self.precision,
            adapter=self.adapter,
            memory=self.memory,
            deterministic=self.deterministic,
            optim=Optim(name=self.optim),
            data=Data(
                "pictures" if self.references else "",
                self.resolution,
                self.batch,
                references=[f"references-{i}" for i in range(self.references)],
            ),
        )


LEAN, BALANCED = Memory("nothing"), Memory("attention")
FAST, PRODUCTS, PLAIN = Memory("everything"), Memory("products"), Memory("nothing", fused=False)
NF4, INT8, BF16 = Precision("nf4"), Precision("int8"), Precision("bf16")
FP8, EIGHT = Precision("nf4", products="fp8"), Precision("nf4", products="int8")
NESTED, LLM = Precision("nf4", double_quant=True), Precision("int8", llm_int8=True)


FLUX2 = {"klein4b": "FLUX.2-klein-base-4B", "klein9b": "FLUX.2-klein-base-9B", "flux2_dev": "FLUX.2-dev"}
SCALE = {FLUX2["klein4b"]: 0.35, FLUX2["klein9b"]: 0.8, FLUX2["flux2_dev"]: 2.8}  # of FLUX.1-dev's weights


def _variants() -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for size in (1024, 512):
        found |= {
            f"reference-nf4-{size}": Variant(NF4, size, PLAIN, optim="adamw8bit", reference=True),
            f"nf4-{size}-balanced": Variant(NF4, size, BALANCED),
            f"nf4-{size}-lean": Variant(NF4, size, LEAN),
            f"nf4-{size}-fast": Variant(NF4, size, FAST),
            f"nf4-{size}-balanced-fp8": Variant(FP8, size, BALANCED),
            f"nf4-{size}-fast-fp8": Variant(FP8, size, FAST),
            f"nf4-{size}-lean-fp8": Variant(FP8, size, LEAN),
            f"nf4-{size}-balanced-int8": Variant(EIGHT, size, BALANCED),
            f"nf4-{size}-some": Variant(NF4, size, Memory("attention", keep_all=26)),
            f"nf4-{size}-unpacked": Variant(NF4, size, Memory("everything", unpacked=True)),
            f"nf4-{size}-compiled": Variant(NF4, size, Memory("attention", compile=True)),
            f"nf4-{size}-products": Variant(NF4, size, PRODUCTS),
            f"nested-{size}-lean": Variant(NESTED, size, LEAN),
            f"nf4-{size}-dora": Variant(NF4, size, BALANCED, Adapter(rank=4, alpha=4.0, dora=True)),
            f"int8-{size}-balanced": Variant(INT8, size, BALANCED),
            f"llm_int8-{size}": Variant(LLM, size, PLAIN, optim="adamw8bit", reference=True),
            f"nf4-{size}-deterministic": Variant(NF4, size, BALANCED, deterministic=True),
            f"nf4-{size}-adamw8bit": Variant(NF4, size, BALANCED, optim="adamw8bit"),
            f"nf4-{size}-launched": Variant(NF4, size, Memory("attention", graph=False)),
            f"nf4-{size}-uncompiled": Variant(NF4, size, Memory("attention", compile=False)),
        }
    found |= {
        "bf16-1024-fast": Variant(BF16, 1024, FAST),
        "bf16-1024-balanced": Variant(BF16, 1024, BALANCED),
        "nf4-1024-streamed": Variant(NF4, 1024, Memory("nothing", budget_gib=4.0)),
        "nf4-512-streamed": Variant(NF4, 512, Memory("nothing", budget_gib=2.4)),
        "nf4-1024-budget8": Variant(NF4, 1024, Memory("attention", budget_gib=8.0)),
    }
    rank16 = Adapter(rank=16, alpha=16.0)
    for name, model in FLUX2.items():
        for size in (1024, 512):
            found |= {
                f"{name}-reference-{size}": Variant(
                    NF4, size, PLAIN, rank16, optim="adamw8bit", reference=True, model=model
                ),
                f"{name}-nf4-{size}-balanced": Variant(NF4, size, BALANCED, rank16, model=model),
                f"{name}-nf4-{size}-lean": Variant(NF4, size, LEAN, rank16, model=model),
                f"{name}-nf4-{size}-fast": Variant(NF4, size, FAST, rank16, model=model),
                f"{name}-int8-{size}-balanced": Variant(INT8, size, BALANCED, rank16, model=model),
                f"{name}-nf4-{size}-balanced-fp8": Variant(FP8, size, BALANCED, rank16, model=model),
            }
    kontext = "FLUX.1-Kontext-dev"
    for count in (1, 2):
        found |= {
            f"kontext-nf4-1024-balanced-{count}": Variant(NF4, 1024, BALANCED, model=kontext, references=count),
            f"klein4b-nf4-1024-balanced-{count}": Variant(
                NF4, 1024, BALANCED, rank16, model=FLUX2["klein4b"], references=count
            ),
        }
    wide = replace(rank16, targets="attention+mlp")
    for kind in ("lora", "dora", "lokr", "loha", "oft"):
        adapter = replace(wide, dora=True) if kind == "dora" else replace(wide, kind=kind)
        found[f"kinds-{kind}-plain"] = Variant(NF4, 1024, PLAIN, adapter)
        if kind in ("lora", "dora"):  # the others know no fast path
            found[f"kinds-{kind}"] = Variant(NF4, 1024, BALANCED, adapter)
    del found["flux2_dev-nf4-1024-fast"]  # 95 GiB
    found |= {
        "klein4b-nf4-1024-budget4": Variant(
            NF4, 1024, Memory("nothing", budget_gib=4.0), rank16, model=FLUX2["klein4b"]
        ),
        "flux2_dev-nf4-1024-budget20": Variant(
            NF4, 1024, Memory("nothing", budget_gib=20.0), rank16, model=FLUX2["flux2_dev"]
        ),
    }
    return found


def need(variant: Variant) -> float:
    """GiB that a config may take, generously: what keeps configs from sharing a card that is too small for them."""
    size = SCALE.get(variant.model, 1.0)
    weights = {"nf4": 6.5, "fp4": 6.5, "int8": 12.0, "bf16": 23.5}[variant.precision.kind] * size
    tokens = ((1 + variant.references) * (variant.resolution // 16) ** 2 + TEXT) * variant.batch / 4608 * max(size, 1.0)
    work = {"nothing": 4.0, "attention": 5.0, "products": 20.0, "everything": 27.0}[variant.memory.keep]
    work += 0.3 * variant.memory.keep_all
    weights += 16 * size * variant.memory.unpacked
    if variant.memory.budget_gib is not None:
        return variant.memory.budget_gib + 1
    return weights + work * tokens + 1.5


VARIANTS = _variants()
# what a variant's seconds, and its GiB, are to be; a ratio's other side is named
RATIOS: list[tuple[str, str, str | None]] = [
    ("nf4-1024-balanced", "reference-nf4-1024", ">= 2.0"),
    ("nf4-512-balanced", "reference-nf4-512", ">= 4.0"),
    ("nf4-1024-fast", "reference-nf4-1024", ">= 2.6"),
    ("nf4-1024-products", "reference-nf4-1024", None),
    *((f"{name}-nf4-{size}-balanced", f"{name}-reference-{size}", None) for name in FLUX2 for size in (1024, 512)),
]
SLOWER: list[tuple[str, str, str | None]] = [
    ("int8-1024-balanced", "nf4-1024-balanced", "<= 1.15"),
    ("int8-512-balanced", "nf4-512-balanced", "<= 1.15"),
    ("nf4-1024-balanced-fp8", "nf4-1024-balanced", "<= 0.84"),
    ("nf4-1024-fast-fp8", "nf4-1024-fast", "<= 0.87"),
    ("nf4-512-balanced-fp8", "nf4-512-balanced", "<= 0.86"),
    ("nf4-512-fast-fp8", "nf4-512-fast", None),
    ("nf4-1024-lean-fp8", "nf4-1024-lean", None),
    ("nf4-1024-balanced-int8", "nf4-1024-balanced", None),
    ("nf4-512-balanced-int8", "nf4-512-balanced", None),
    ("llm_int8-1024", "reference-nf4-1024", None),
    ("nf4-1024-deterministic", "nf4-1024-balanced", None),
    ("nf4-512-deterministic", "nf4-512-balanced", None),
]
SECONDS = {
    "nf4-1024-balanced": "<= 0.39",
    "nf4-512-some": "<= 0.115",
    "nf4-1024-streamed": "<= 0.60",
    "nf4-512-streamed": "<= 0.38",
    "klein4b-nf4-1024-balanced": "<= 0.19",
    "klein4b-nf4-512-balanced": "<= 0.07",
    "klein9b-nf4-1024-balanced": "<= 0.40",
}
PROFILED = (
    "nf4-1024-balanced",
    "nf4-1024-balanced-fp8",
    "nf4-512-balanced",
    "nf4-1024-fast",
    "int8-1024-balanced",
    "reference-nf4-1024",
)
MEMORY = {
    "nf4-1024-balanced": "<= 10.8",
    "nf4-512-balanced": "<= 7.9",
    "nf4-1024-lean": "<= 9.0",
    "nf4-512-lean": "<= 7.2",
    "nf4-1024-streamed": "<= 4.0",
    "nf4-512-streamed": "<= 2.4",
    "nf4-1024-budget8": "<= 8.0",
    "klein4b-nf4-1024-budget4": "<= 4.0",
    "flux2_dev-nf4-1024-budget20": "<= 20.0",
    "flux2_dev-nf4-1024-balanced": "<= 78",
}
