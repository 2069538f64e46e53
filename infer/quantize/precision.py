"""Precisions: which bitsandbytes format a model's linear layers are stored in.

The libraries do the work (quantizer.py says what they are given); this file checks afterwards that what was asked for
happened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

from infer.program.bounds import GIB, check_most
from infer.program.no_effect import refuse_idle

KINDS = ("fp32", "bf16", "int8", "fp4", "nf4")
QUANTIZED = ("int8", "fp4", "nf4")
FOUR_BIT = ("fp4", "nf4", "auto")
MIXED = ("bf16", *QUANTIZED)  # what layers of one transformer may be beside each other
PRODUCTS = ("bf16", "fp8", "int8")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names


@dataclass
class Precision:
    """How the linear layers of the transformer and of the large text encoder (T5, Qwen3 or Mistral) are stored and
    multiplied.

    4-bit weights, and int8 ones of the transformer, are dequantized for each product, which runs in `compute_dtype`
    or, of the transformer's blocks, in 8 bits (`products`).
    """

    kind: str = "nf4"
    """fp32, bf16 (not quantized), int8 (a scale a row, Dettmers 2022), fp4 or nf4 (QLoRA, Dettmers 2023); auto: nf4,
    and its worst layers int8 or bf16 as far as `budget_gib` goes."""
    compute_dtype: str = "bf16"
    """bf16, fp16 or fp32: the matrix products, and whatever stays unquantized. LLM.int8 multiplies in fp16 whatever
    this says. Kind fp32 is its own compute dtype, and so is bf16 but for fp16, in which its weights are stored too.
    fp16: infer/fast/half.py, by itself where a card has no bf16."""
    double_quant: bool = False
    """4-bit only: quantize the absmax of every block too, 0.4 bits a weight less."""
    products: str = "bf16"
    """How the blocks' frozen weights are multiplied, whatever they are stored as, forward and for the gradient: bf16,
    or rounded to fp8 (cards from RTX 40, L40S and H100 on) or int8 (from RTX 30 and A100 on) for the time of a product
    (infer/fast/eight_bit.py). Adapters, norms, attention and the residual stream stay as they are, and the text
    encoder too."""
    llm_int8: bool = False
    """int8 only: quantize the activations too and multiply in int8, as bitsandbytes does by itself (the text
    encoder always does, but on cards without bf16)."""
    outlier_threshold: float = 6.0
    """LLM.int8 only: activations beyond this are multiplied in fp16; 0 multiplies all in int8."""
    skip_modules: list[str] = field(default_factory=list)
    """Names (or ends of names) of transformer layers to leave in `compute_dtype`."""
    layers: dict[str, str] = field(default_factory=dict)
    """Transformer layers of other kinds: a regular expression over whole layer names -> bf16, int8, fp4 or nf4; the
    first that matches counts, and what none matches is of `kind`."""
    budget_gib: float | None = None
    """Kind auto only: the transformer's bytes. Within them the layers that suffer most from NF4 are int8 or bf16
    (infer/sensitivity.py)."""
    t5: str = "same"
    """The kind of the text encoder (T5 of FLUX.1, Qwen3 of klein, Mistral of FLUX.2-dev); `same` follows `kind` with
    these settings."""

    def __post_init__(self) -> None:
        check_most(self, "precision.", outlier_threshold=10**6, budget_gib=GIB)
        if self.kind not in (*KINDS, "auto"):
            raise ValueError(f"precision.kind is {self.kind!r}; choose one of {', '.join(KINDS)}, or auto")
        if self.t5 not in ("same", *KINDS):
            raise ValueError(f"precision.t5 is {self.t5!r}; choose same or one of {', '.join(KINDS)}")
        if self.compute_dtype not in DTYPES:
            raise ValueError(f"precision.compute_dtype is {self.compute_dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.outlier_threshold < 0:
            raise ValueError(f"precision.outlier_threshold is {self.outlier_threshold}; it must be 0 or more")
        if self.llm_int8 and "int8" not in (self.kind, *self.layers.values()):
            raise ValueError(f"precision.llm_int8 is a way to multiply int8 weights, not {self.kind}; set it to false")
        self._check_layers()
        self._check_products()
        if self.kind == "auto" and self.budget_gib is None:
            raise ValueError("precision.budget_gib is null; kind auto needs the transformer's bytes, such as 8")
        if self.kind != "auto" and self.budget_gib is not None:
            raise ValueError(f"precision.budget_gib belongs to kind auto, not {self.kind}; set precision.kind=auto")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"precision.budget_gib is {self.budget_gib}; it must be above 0")
        self._check_idle()

    def _check_idle(self) -> None:
        """Settings of a kind that neither the transformer's layers nor the text encoder's are of."""
        t5 = self._t5_kind()
        kinds = {self.kind, *self.layers.values(), t5}
        said = f"precision.kind={self.kind} and precision.t5={self.t5}"
        if not kinds & set(FOUR_BIT):
            refuse_idle(self, "precision.", ("double_quant",), f"with {said} no layer is nf4 or fp4")
        if not self.llm_int8 and t5 != "int8":
            reason = f"with precision.llm_int8=false and {said} nothing is multiplied by LLM.int8"
            refuse_idle(self, "precision.", ("outlier_threshold",), reason)
        if not self.quantized:
            reason = f"with precision.kind={self.kind} no layer of the transformer is quantized"
            refuse_idle(self, "precision.", ("skip_modules",), reason)
        if not self.quantized and t5 not in QUANTIZED and self.compute_dtype not in (self.kind, "fp16"):
            reason = f"nothing is quantized, and precision.kind={self.kind} is its own compute dtype"
            refuse_idle(self, "precision.", ("compute_dtype",), reason)

    def _check_products(self) -> None:
        if self.products not in PRODUCTS:
            raise ValueError(f"precision.products is {self.products!r}; choose one of {', '.join(PRODUCTS)}")
        if self.products == "bf16":
            return
        if self.llm_int8:
            raise ValueError(
                f"precision.products={self.products} and precision.llm_int8=true are two ways to multiply; set "
                "precision.llm_int8=false, or precision.products=bf16"
            )
        if self.dtype_name != "bf16":
            raise ValueError(
                f"precision.products={self.products} takes the place of products in bf16, not of those in "
                f"{self.dtype_name}; set precision.products=bf16, or a kind and compute_dtype that multiply in bf16"
            )

    def _check_layers(self) -> None:
        for pattern, kind in self.layers.items():
            if kind not in MIXED:
                raise ValueError(f"precision.layers gives {pattern!r} the kind {kind!r}; choose {', '.join(MIXED)}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"precision.layers names {pattern!r}, no regular expression: {error}") from error
        if self.layers and self.kind in ("fp32", "auto"):
            raise ValueError(
                f"precision.layers cannot be mixed with kind {self.kind}; choose {', '.join(MIXED)} for the others"
            )

    @property
    def quantized(self) -> bool:
        return any(kind in (*QUANTIZED, "auto") for kind in (self.kind, *self.layers.values()))

    @property
    def exact(self) -> bool:
        """Whether no weight is rounded below `compute_dtype`, neither stored nor for its product."""
        return not self.quantized and self.products == "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is not quantized, and of the 4-bit products."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype_name])
        return dtype

    @property
    def dtype_name(self) -> str:
        """bf16, fp16 or fp32: the name of `dtype`."""
        if self.quantized or (self.kind, self.compute_dtype) == ("bf16", "fp16"):
            return self.compute_dtype
        return self.kind

    @property
    def itemsize(self) -> int:
        """Bytes of a value of `dtype`."""
        return 4 if self.dtype_name == "fp32" else 2

    def for_t5(self) -> Precision:
        """The same settings at the large text encoder's own kind; skipped modules are the transformer's."""
        kind = self._t5_kind()
        settings = {
            "compute_dtype": (self.compute_dtype, kind in QUANTIZED),
            "double_quant": (self.double_quant, kind in FOUR_BIT),
            "outlier_threshold": (self.outlier_threshold, kind == "int8"),
        }
        return Precision(kind, **{name: value for name, (value, counts) in settings.items() if counts})  # type: ignore[arg-type]

    def _t5_kind(self) -> str:
        return self.t5 if self.t5 != "same" else "nf4" if self.kind == "auto" else self.kind


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, quantized ones included (they are subclasses)."""
    from torch import nn

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def kind_of(layer: nn.Module) -> str | None:
    """`int8`, `fp4` or `nf4` for a quantized layer, else None."""
    import bitsandbytes as bnb
    import torch

    if isinstance(layer, bnb.nn.Linear8bitLt):
        return "int8" if layer.weight.dtype == torch.int8 else None
    if isinstance(layer, bnb.nn.Linear4bit):
        return str(layer.weight.quant_type) if layer.weight.quant_state is not None else None
    return None


def check_quantized(model: nn.Module, precision: Precision, kept: tuple[str, ...] = ()) -> int:
    """The number of quantized layers, after comparing each layer with what was asked.

    `kept` names ends of layer names that the library itself leaves alone.

    Raises:
        ValueError: a layer is stored otherwise than asked, or a name in `skip_modules` matches none.
    """
    layers = linear_layers(model)
    check_layer_names(precision, layers)
    wrong = []
    count = 0
    for name, layer in layers.items():
        asked = None if any(names_layer(end, name) for end in kept) else kind_asked(precision, name)
        found = kind_of(layer)
        count += found is not None
        if found != asked:
            wrong.append(f"{name} ({found or 'not quantized'} instead of {asked or 'not quantized'})")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(layers)} linear layers are not stored as precision={precision.kind} asks: "
            f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}. Choose the precision of the checkpoint, or "
            "load an unquantized one."
        )
    return count


def check_layer_names(precision: Precision, layers: Iterable[str]) -> None:
    """Compare the names in a precision with those of a model's linear layers.

    Raises:
        ValueError: `skip_modules` or `layers` names none of them.
    """
    layers = list(layers)
    for name in (*precision.skip_modules, *precision.layers):
        option, matches = ("layers", re.fullmatch) if name in precision.layers else ("skip_modules", names_layer)
        if not any(matches(name, layer) for layer in layers):
            raise ValueError(
                f"precision.{option} names {name!r}, but no linear layer of the model has that name; "
                f"there are {', '.join(sorted({re.sub(r'[.][0-9]+[.]', '.*.', layer) for layer in layers}))}"
            )


def kind_asked(precision: Precision, layer: str) -> str | None:
    """`int8`, `fp4` or `nf4` if a precision says so of a transformer layer, else None."""
    if any(names_layer(name, layer) for name in precision.skip_modules):
        return None
    kinds = (kind for pattern, kind in precision.layers.items() if re.fullmatch(pattern, layer))
    kind = next(kinds, precision.kind)
    return kind if kind in QUANTIZED else None


def names_layer(skip: str, layer: str) -> bool:
    return f".{skip}." in f".{layer}."
