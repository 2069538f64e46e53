"""Small calls that need every kernel of a model's fused blocks between them.

What Triton compiles depends on dtypes, on a model's width and an adapter's rank, not on tokens or batch: calls of a few
rows compile the kernels that a whole step needs. Reference pictures are further tokens, and need no others.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infer.fast import fused_activation, fused_gate, fused_heads, fused_norm
from infer.fast.add_product import add_product
from infer.fast.eight_bit import eight_of, product
from infer.fast.few_rows import few_rows_int8
from infer.fast.fused_gain import gain_backward
from infer.fast.fused_heads import Heads
from infer.fast.fused_linear import spare_of
from infer.fast.int8_kernels import multiply_int8
from infer.fast.kept_attention import kept_attention
from infer.fast.thin import padded_rank, thin_of
from infer.fast.weights import Linear, Lora, Stack, dequantize_at_once
from infer.quantize.precision import FOUR_BIT, QUANTIZED, Precision

ROWS, OUT = 32, 128  # of inputs, and a layer's outputs
Call = tuple[Callable[..., object], tuple[Any, ...]]  # a function and its arguments: equal ones compile the same


class Use(NamedTuple):
    """What a run does with a model, as far as its kernels depend on it."""

    rank: int = 16
    """Of its adapters."""
    learns: bool = False
    """Whether they are trained."""
    dora: bool = False
    """Whether they are DoRA's."""
    repeatable: bool = False
    """Whether the attention's gradient is to be the same every time."""


class Place(NamedTuple):
    """Where tensors lie, and what they are of."""

    device: torch.device
    dtype: torch.dtype

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def kernel_calls(config: Mapping[str, Any], precision: Precision, use: Use, device: torch.device) -> Iterator[Call]:
    """config: the transformer's."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    own, width = Place(device, precision.dtype), heads * head
    flux1 = "pooled_projection_dim" in config
    activation, hidden = ("gelu", 4) if flux1 else ("swiglu", 6)
    kinds = {kind if kind in QUANTIZED else "plain" for kind in (precision.kind, *precision.layers.values())}
    stored = [(kind, kind in FOUR_BIT and precision.double_quant) for kind in sorted(kinds)]
    together = (1, 3, 4) if flux1 else (1, 3)  # layers that read one input
    yield _norm, (own, width)
    yield _gate, (own, width)
    yield _heads, (own, heads, head, 1)
    yield _heads, (own, heads, head, 2)
    yield _activation, (own, width, activation, hidden)
    yield _attention, (own, heads, head, use.learns, use.repeatable)
    for count in together:
        yield _adapter, (own, width, count, use.rank, torch.float32 if use.learns else precision.dtype)
        if use.dora:
            yield _gains, (own, count, use.rank, use.learns)
    columns = {spare_of([use.rank] * count) for count in together}
    spares = {0} if use.dora or precision.products != "bf16" else {0, *columns}
    for kind, nested in stored:
        for spare in sorted(spares) if kind != "plain" else ():
            yield _weights, (own, width, kind, nested, spare)
        if flux1 and kind == "int8":
            yield _modulation, (own, width)
    if use.learns:
        yield _norm_gradient, (own, width)
        yield _gate_gradient, (own, width)
        yield _heads_gradient, (own, heads, head)
        yield _activation_gradient, (own, width, activation, hidden)
    if precision.products != "bf16":
        mlp = hidden if flux1 else hidden // 2  # of the activation's output
        forward, back = (1, mlp, 1 + mlp), (1, 3, hidden, 3 + hidden)  # what is summed over, in widths
        for kind, nested in stored:
            for across, sums in ((False, forward), (True, back if use.learns else ())):
                # kernels are made for the power of two that a row fits in
                for size in sorted({1 << (count * width - 1).bit_length(): count * width for count in sums}.values()):
                    yield _rounded, (own, kind, nested, precision.products, size, across)
        if precision.products == "int8":
            yield _wide_int8, (own,)


def _norm(own: Place, width: int) -> None:
    shift, scale, _ = own.zeros(1, 3 * width).chunk(3, dim=-1)
    fused_norm.forward(shift, scale, (own.zeros(1, ROWS, width),) * 2)


def _norm_gradient(own: Place, width: int) -> None:
    streams = (own.zeros(1, ROWS, width),) * 2
    fused_norm.backward(own.zeros(1, 2 * ROWS, width), own.zeros(1, 3 * width).chunk(3, dim=-1)[1], streams, streams)


def _gate(own: Place, width: int) -> None:
    gate = own.zeros(1, 3 * width).chunk(3, dim=-1)[2]
    fused_gate.forward(gate, own.zeros(1, 2 * ROWS, width), (own.zeros(1, ROWS, width),) * 2)


def _gate_gradient(own: Place, width: int) -> None:
    fused_gate.backward(own.zeros(1, 3 * width).chunk(3, dim=-1)[2], (own.zeros(1, ROWS, width),) * 2)


def _how(own: Place, heads: int, each: int, count: int) -> tuple[Heads, tuple[Tensor, ...]]:
    angles = torch.zeros(count * ROWS, each, device=own.device)
    products = tuple(own.zeros(1, ROWS, 3 * heads * each) for _ in range(count))
    return Heads(heads, (own.zeros(each),) * (2 * count), angles, angles), products


def _heads(own: Place, heads: int, each: int, count: int) -> None:
    fused_heads.forward(*_how(own, heads, each, count))


def _heads_gradient(own: Place, heads: int, each: int) -> None:
    how, products = _how(own, heads, each, 1)
    given = tuple(own.zeros(1, ROWS, heads, each) for _ in range(3))
    fused_heads.backward(how, products, given, [torch.empty_like(products[0])])


def _behind(own: Place, width: int, hidden: int) -> Tensor:
    """The MLP's columns of a product that begins with q, k and v."""
    return own.zeros(1, ROWS, (3 + hidden) * width)[..., 3 * width :]


def _activation(own: Place, width: int, kind: str, hidden: int) -> None:
    fused_activation.forward(kind, own.zeros(1, ROWS, width), _behind(own, width, hidden))


def _activation_gradient(own: Place, width: int, kind: str, hidden: int) -> None:
    rest, wide = _behind(own, width, hidden), hidden * width // (2 if kind == "swiglu" else 1)
    fused_activation.backward(kind, rest, own.zeros(1, ROWS, width + wide), width, torch.empty_like(rest))


def _attention(own: Place, heads: int, each: int, learns: bool, repeatable: bool) -> None:
    for tokens in (ROWS, 128) if repeatable else (ROWS,):  # of whole tiles, and not
        q, k, v = (own.zeros(1, tokens, heads, each).requires_grad_(learns) for _ in range(3))
        out = kept_attention(q, k, v, repeatable)
        if learns:
            out.sum().backward()


def _adapter(own: Place, width: int, count: int, rank: int, dtype: torch.dtype) -> None:
    """Adapters whose parameters are of `dtype`, of so many layers that read one input."""
    theirs = Place(own.device, dtype)
    lora = Lora(theirs.zeros(rank, width), theirs.zeros(OUT, rank), torch.ones((), device=own.device), None)
    frozen = Stack("plain", (count * OUT, width), (OUT,) * count, own.zeros(1), None, None, None)
    thin = thin_of(Linear(frozen, ((lora,),) * count), own.dtype)
    assert thin is not None and thin.starts is not None
    outputs, inner = (own.zeros(ROWS, size) for size in thin.up.shape)
    add_product(outputs, inner, thin.up, starts=list(thin.starts))
    add_product(outputs, inner, thin.up)  # as to the gradient of an input


def _gains(own: Place, count: int, rank: int, learns: bool) -> None:
    """DoRA's, with biases and without."""
    inner, starts = count * padded_rank(rank), [OUT * i for i in range(1, count)]
    outputs, gain = own.zeros(ROWS, count * OUT), torch.ones(count * OUT, device=own.device)
    for bias in (None, own.zeros(count * OUT)):
        add_product(outputs, own.zeros(ROWS, inner), own.zeros(count * OUT, inner), gain, bias, starts)
        if learns:
            gain_backward(outputs, outputs, gain, bias, 0)


def _stack(own: Place, rows: int, columns: int, kind: str, nested: bool) -> Stack:
    """Weights of zeros, stored as a kind is."""
    shape, count = (rows, columns), rows * columns
    if kind == "plain":
        return Stack(kind, shape, (rows,), own.zeros(*shape), None, None, None)
    if kind == "int8":
        return Stack(
            kind, shape, (rows,), own.zeros(*shape).to(torch.int8), torch.ones(rows, device=own.device), None, None
        )
    stored = torch.zeros(count // 2, 1, dtype=torch.uint8, device=own.device)
    scale = torch.ones(count // 64, device=own.device)
    if not nested:
        return Stack(kind, shape, (rows,), stored, scale, None, None)
    outer, code, offset = (torch.ones(size, device=own.device) for size in (-(-count // 64 // 256), 256, 1))
    return Stack(kind, shape, (rows,), stored, scale.to(torch.uint8), (outer, code, offset), None)


def _weights(own: Place, width: int, kind: str, nested: bool, spare: int) -> None:
    dequantize_at_once(_stack(own, 3 * ROWS, width, kind, nested), own.dtype, spare)


def _modulation(own: Place, width: int) -> None:
    frozen = _stack(own, ROWS, width, "int8", False)
    assert frozen.scale is not None
    few_rows_int8(own.zeros(1, width), frozen.stored, frozen.scale)


def _rounded(own: Place, kind: str, nested: bool, products: str, size: int, across: bool) -> None:
    """A product in 8 bits whose sums are of so many values, forward with a bias, or across for a gradient."""
    frozen = _stack(own, *((size, 128) if across else (128, size)), kind, nested)
    frozen = frozen._replace(eight=eight_of(frozen, products, own.device))
    product(own.zeros(ROWS, size), frozen, across, None if across else own.zeros(128))


def _wide_int8(own: Place) -> None:
    """The tile of large products."""
    if own.device.type == "cuda":
        rows, columns = 2 * 132 * 128, 256
        a, b = (torch.zeros(count, 128, dtype=torch.int8, device=own.device) for count in (rows, columns))
        multiply_int8(a, b, *(torch.ones(count, device=own.device) for count in (rows, columns)))
