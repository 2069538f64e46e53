"""The frozen weights of layers that read one input, as one tensor: one product, and one call that dequantizes them.

Each layer keeps a view of its part, so that nothing is stored twice and saving, merging and loading adapters see what
they saw before.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infer.fast.dequantize import dequantize_4bit, dequantize_int8
from infer.quantize.precision import kind_of, linear_layers
from infer.quantize.storage import int8_values

# layers of a block that read one input; what a block lacks (proj_mlp, of a double one) is left out
TOGETHER = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)


class Eight(NamedTuple):
    """How a stack is rounded to 8 bits for its products (infer/fast/eight_bit.py)."""

    products: str  # fp8 or int8
    rows: Tensor  # [out]: what an 8-bit value of each row is multiplied by, where products sum over in
    columns: Tensor  # [in]: likewise of each column, where the gradient's products sum over out
    one: Tensor  # [], a one


class Stack(NamedTuple):
    """The frozen weights of layers that read one input, as they are stored, behind each other: [out, in] in all."""

    kind: str  # int8, fp4, nf4 or plain
    shape: tuple[int, int]
    widths: tuple[int, ...]  # out features of each layer
    stored: Tensor  # packed 4-bit pairs [out * in / 2, 1], int8 [out, in], or the weights themselves
    scale: (
        Tensor | None
    )  # 4-bit: absmax of each block of 64; double-quantized: its 8-bit code; int8: absmax of each row
    nested: (
        tuple[Tensor, Tensor, Tensor] | None
    )  # double quantization: absmax of absmax, its code book, each layer's offset
    bias: Tensor | None
    shared: bool = True  # 4-bit: one dequantized copy for a block's recomputation and its gradient
    in_place: bool = True  # adapters' updates are added to the product in place
    half: bool = False  # products in fp16 of rows that are scaled into its range (infer/fast/half.py)
    eight: Eight | None = None  # products in 8 bits


class Lora(NamedTuple):
    """One adapter on one layer."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]
    strength: Tensor  # []
    magnitude: Tensor | None  # DoRA's [out]


class Linear(NamedTuple):
    """Layers that read one input, with the adapters of each."""

    frozen: Stack
    adapters: tuple[tuple[Lora, ...], ...]


def dequantize(stack: Stack, dtype: torch.dtype, turn: int = 0) -> Tensor:
    """The weights [out, in] that take part in products; for `turn` see dequantize_4bit."""
    if stack.kind == "plain":
        return stack.stored.to(dtype)
    if stack.kind == "int8":
        assert stack.scale is not None
        return int8_values(stack.stored, stack.scale, dtype)
    return _four_bit(stack, dtype, turn, 0)


def dequantize_at_once(stack: Stack, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """As `dequantize`, in one pass without a compiler; with `spare` columns that hold nothing yet behind the values of
    quantized weights."""
    if stack.kind == "plain":
        assert not spare
        return stack.stored.to(dtype)
    if stack.kind == "int8":
        assert stack.scale is not None
        return dequantize_int8(stack.stored, stack.scale, dtype, spare)
    return _four_bit(stack, dtype, 0, spare)


def _four_bit(stack: Stack, dtype: torch.dtype, turn: int, spare: int) -> Tensor:
    assert stack.scale is not None
    outer, code, offsets = stack.nested or (None, None, None)
    ends, shape = four_bit_ends(stack), list(stack.shape)
    weights: Tensor = dequantize_4bit(
        stack.stored, stack.scale, outer, code, offsets, ends, stack.kind, shape, dtype, turn, spare
    )
    return weights


def unpacked(stack: Stack, dtype: torch.dtype) -> Stack:
    """The stack with a copy of its values as they take part in products; the layers keep what is stored."""
    return stack._replace(kind="plain", stored=dequantize(stack, dtype), scale=None, nested=None)


def four_bit_ends(stack: Stack) -> list[int]:
    """The block of 64 values at which each layer ends."""
    return [sum(stack.widths[: i + 1]) * stack.shape[1] // 64 for i in range(len(stack.widths))]


def stack(layers: list[Any]) -> Stack:
    """The layers' stored weights, copied behind each other.

    Raises:
        ValueError: they are not of one kind, or of a block size that cannot be stacked.
    """
    kinds = {kind_of(layer) or "plain" for layer in layers}
    if len(kinds) > 1:
        raise ValueError(f"layers that read one input are stored as {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    shape = sum(layer.out_features for layer in layers), layers[0].in_features
    widths = tuple(layer.out_features for layer in layers)
    bias = None if layers[0].bias is None else _concatenated([layer.bias.data for layer in layers])
    if kind == "plain":
        return Stack(kind, shape, widths, _concatenated([layer.weight.data for layer in layers]), None, None, bias)
    if kind == "int8":
        for layer in layers:
            if layer.state.CB is None:
                layer.init_8bit_state()  # moves codes and scales from the weight to where forward reads them
        stored, scale = (_concatenated([getattr(layer.state, name) for layer in layers]) for name in ("CB", "SCB"))
        return Stack(kind, shape, widths, stored, scale, None, bias)
    states = [layer.weight.quant_state for layer in layers]
    if shape[1] % 64 or any(state.blocksize != 64 for state in states):
        raise ValueError(f"4-bit blocks of 64 do not end with the rows of {shape[1]} features")
    stored = _concatenated([layer.weight.data.view(-1, 1) for layer in layers])
    scale = _concatenated([state.absmax for state in states])
    nested = None
    if states[0].nested:
        if any(state.absmax.numel() % 256 for state in states[:-1]):
            raise ValueError("blocks of 256 scales do not end with the layers")
        outer = _concatenated([state.state2.absmax for state in states])
        nested = outer, states[0].state2.code, torch.stack([state.offset for state in states])
    return Stack(kind, shape, widths, stored, scale, nested, bias)


def can_cut(frozen: Stack, row: int) -> bool:
    """Whether a layer's weights can be read from a row on: double-quantized ones where a block of 256 scales ends."""
    return frozen.nested is None or row * frozen.shape[1] % (64 * 256) == 0


def rows_of(layers: Linear, start: int, end: int) -> Linear:
    """The outputs from `start` to `end` of one layer without bias, as a layer of its own on the same memory."""
    frozen, (adapters,) = layers.frozen, layers.adapters
    assert frozen.bias is None and len(frozen.widths) == 1
    scale, nested = frozen.scale, frozen.nested
    if frozen.kind in ("plain", "int8"):
        stored = frozen.stored[start:end]
        scale = None if scale is None else scale[start:end]
    else:
        assert scale is not None
        columns = frozen.shape[1]
        first, last = start * columns // 64, end * columns // 64
        stored, scale = frozen.stored[first * 32 : last * 32], scale[first:last]
        if nested is not None:
            assert can_cut(frozen, start)
            nested = nested[0][first // 256 : -(-last // 256)], *nested[1:]
    # a column's scale is that of its largest value, which holds for some of its rows too
    eight = None if frozen.eight is None else frozen.eight._replace(rows=frozen.eight.rows[start:end])
    part = frozen._replace(
        shape=(end - start, frozen.shape[1]), widths=(end - start,), stored=stored, scale=scale, nested=nested,
        eight=eight,
    )  # fmt: skip
    cut = (
        lora._replace(up=lora.up[start:end], magnitude=None if lora.magnitude is None else lora.magnitude[start:end])
        for lora in adapters
    )
    return Linear(part, (tuple(cut),))


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def use_views(layers: list[Any], frozen: Stack) -> None:
    """Make the layers' own weights views of the stack, so that nothing is stored twice."""
    rows = list(frozen.widths)
    if frozen.bias is not None:
        for layer, part in zip(layers, frozen.bias.split(rows), strict=True):
            layer.bias.data = part
    if frozen.kind == "plain":
        for layer, part in zip(layers, frozen.stored.split(rows), strict=True):
            layer.weight.data = part
        return
    assert frozen.scale is not None
    if frozen.kind == "int8":
        parts = zip(layers, frozen.stored.split(rows), frozen.scale.split(rows), strict=True)
        for layer, codes, scales in parts:
            layer.weight.data = layer.state.CB = codes
            layer.state.SCB = scales
        return
    states = [layer.weight.quant_state for layer in layers]
    stored = frozen.stored.split([layer.weight.data.numel() for layer in layers])
    scales = frozen.scale.split([state.absmax.numel() for state in states])
    for layer, state, codes, absmax in zip(layers, states, stored, scales, strict=True):
        layer.weight.data = codes
        state.absmax = absmax
    if frozen.nested is not None:
        outer = frozen.nested[0].split([state.state2.absmax.numel() for state in states])
        for state, absmax, offset in zip(states, outer, frozen.nested[2], strict=True):
            state.state2.absmax, state.offset = absmax, offset


def adapters_of(layer: Any, holds: bool = False) -> tuple[Lora, ...]:
    """The adapters that are switched on at a layer; holds: with those in training that are off, at strength 0, so that
    code compiled for them serves without them too. DoRA's are never held: at strength 0 they still scale."""
    if not hasattr(layer, "base_layer"):
        return ()
    on = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    vectors = layer.lora_magnitude_vector
    off = [name for name in trained(layer) if name not in on and name not in vectors] if holds else []
    found = []
    for name in (*on, *off):
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        magnitude = vectors[name].weight if name in vectors else None
        strength = float(layer.scaling[name]) if name in on else 0.0
        found.append(Lora(down, up, _number(strength, down.device), magnitude))
    return tuple(found)


def trained(layer: Any) -> list[str]:
    """The adapters of a layer that are in training."""
    return [name for name, down in getattr(layer, "lora_A", {}).items() if down.weight.requires_grad]


@cache  # all of them: captured graphs read them where they are
def _number(value: float, device: torch.device) -> Tensor:
    # a tensor and not a Python number, which would be compiled in
    return torch.tensor(value, device=device)


def groups(layers: Iterable[str]) -> list[list[str]]:
    """Names of linear layers, those that read one input together, in the order of the first of each."""
    found: dict[str, list[str]] = {}
    for name in layers:
        ends = (end for end in TOGETHER if any(name.endswith(f".{layer}") for layer in end))
        end = next(ends, None)
        last = next((layer for layer in end or () if name.endswith(f".{layer}")), "")
        found.setdefault(f"{name.removesuffix(last)}{end[0]}" if end else name, []).append(name)
    return list(found.values())


def split_kinds(stored: dict[str, str | None]) -> str | None:
    """Layers that read one input and are stored in several kinds, if there are any; `stored`: kinds by layer."""
    for group in groups(stored):
        kinds = {stored[name] or "plain" for name in group}
        if len(kinds) > 1:
            names = ", ".join([group[0], *(name.rpartition(".")[2] for name in group[1:])])
            return f"{names} read one input and are stored as {' and '.join(sorted(kinds))}"
    return None


def obstacle(transformer: nn.Module) -> str | None:
    """Why the fast path cannot stand in for the transformer's layers; None if it can."""
    layers = {name.removesuffix(".base_layer"): layer for name, layer in linear_layers(transformer).items()}
    split = split_kinds({name: kind_of(layer) for name, layer in layers.items()})
    if split is not None:
        return split
    for name, layer in transformer.named_modules():
        if "blocks." not in name or not hasattr(layer, "base_layer"):
            continue
        if getattr(layer, "merged", False):
            return f"the adapter is merged into {name}"
        if not hasattr(layer, "lora_A"):
            return f"it has no adapters of kind {type(layer).__module__.split('.')[-2]}"
        for key in layer.lora_A:
            if layer.lora_dropout[key].__class__.__name__ != "Identity":
                return "adapter.dropout is above 0"
            if getattr(layer, "lora_bias", {}).get(key):
                return f"{name} has an adapter with a bias of its own"
            if key in layer.lora_magnitude_vector and len(layer.active_adapters) > 1:
                return "DoRA beside another adapter"
    return None
