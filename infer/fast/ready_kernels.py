"""The kernels of fused blocks, compiled in threads while a model is loaded.

Triton compiles a kernel when it is first called, in half a second, and keeps it on disk (infer/device/compiler.py).
What it compiles depends on dtypes, on a model's width and an adapter's rank, not on tokens or batch: calls of a few
rows compile the kernels that a whole step needs.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from infer.device.compiler import prepare_compiler
from infer.fast import fused_activation, fused_gate, fused_heads, fused_norm
from infer.fast.add_product import add_product
from infer.fast.fold import folded
from infer.fast.fused_gain import gain_backward
from infer.fast.fused_heads import Heads
from infer.fast.kept_attention import kept_attention
from infer.fast.memory import Memory
from infer.fast.thin import thin_of
from infer.fast.weights import Linear, Lora, Stack, dequantize
from infer.quantize.precision import Precision

ROWS = 32
BESIDE = 6  # kernels that are compiled beside each other: most of that is not Python
_begun: list[Future[object]] = []


def prepare_kernels(
    config: Mapping[str, Any],
    precision: Precision,
    memory: Memory,
    device: torch.device,
    rank: int = 16,
    learns: bool = False,
    dora: bool = False,
) -> None:
    """Call before a transformer is loaded for a GPU, once the user's settings are checked: what its blocks need is
    compiled meanwhile, by Triton or, where torch.compile will be needed, by helpers that are started now.

    config: the transformer's; rank, dora: of its adapters; learns: whether they are trained.
    """
    if not (memory.fused and memory.compiles(device)):
        return
    own = memory.kernels(device) and precision.dtype != torch.float16
    prepare_compiler(device, pool=not own)
    if own and device.type == "cuda":
        pool = ThreadPoolExecutor(BESIDE, thread_name_prefix="kernels")
        _begun.extend(
            pool.submit(_apart, device, work) for work in _works(config, precision, rank, learns, dora, device)
        )
        pool.shutdown(wait=False)


def wait() -> None:
    """Until what was begun is done: two threads would compile a kernel twice."""
    while _begun:
        # one that failed, as for want of memory, has cost time alone: the first call compiles, or says what is wrong
        _begun.pop().exception()


def _apart(device: torch.device, work: Callable[[], object]) -> None:
    with torch.cuda.stream(torch.cuda.Stream(device)):
        work()
    torch.cuda.empty_cache()


def _works(
    config: Mapping[str, Any], precision: Precision, rank: int, learns: bool, dora: bool, device: torch.device
) -> list[Callable[[], object]]:
    """Calls that need every kernel between them. Gradients are called by themselves: autograd has one thread a card."""
    heads, each = config["num_attention_heads"], config["attention_head_dim"]
    width, dtype = heads * each, precision.dtype
    kind, hidden = ("swiglu", 6) if "pooled_projection_dim" not in config else ("gelu", 4)  # FLUX.2, FLUX.1

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def streams(count: int = 2) -> tuple[Tensor, ...]:
        return tuple(zeros(1, ROWS, width) for _ in range(count))

    def part(i: int) -> Tensor:
        return zeros(1, 3 * width).chunk(3, dim=-1)[i]

    def heads_for(count: int) -> tuple[Heads, tuple[Tensor, ...]]:
        angles = torch.zeros(count * ROWS, each, device=device)
        how = Heads(heads, (zeros(each),) * (2 * count), angles, angles)
        return how, tuple(zeros(1, ROWS, 3 * width) for _ in range(count))

    def of_heads() -> None:
        how, products = heads_for(1)
        given = tuple(zeros(1, ROWS, heads, each) for _ in range(3))
        fused_heads.backward(how, products, given, [zeros(1, ROWS, 3 * width)])

    def attended() -> None:
        q, k, v = (zeros(1, ROWS, heads, each).requires_grad_(learns) for _ in range(3))
        out = kept_attention(q, k, v, False)
        if learns:
            out.sum().backward()

    behind, product = zeros(1, ROWS, width), zeros(1, ROWS, (3 + hidden) * width)
    rest, wide = product[..., 3 * width :], hidden * width // (2 if kind == "swiglu" else 1)
    found: list[Callable[[], object]] = [
        lambda: fused_norm.forward(part(0), part(1), streams()),
        lambda: fused_gate.forward(part(2), zeros(1, 2 * ROWS, width), streams()),
        lambda: fused_heads.forward(*heads_for(1)),
        lambda: fused_heads.forward(*heads_for(2)),
        lambda: fused_activation.forward(kind, behind, rest),
        attended,
        lambda: _adapted(precision, width, rank, learns, dora, device),
    ]
    if learns:
        found += [
            lambda: fused_norm.backward(zeros(1, 2 * ROWS, width), part(1), streams(), streams()),
            lambda: fused_gate.backward(part(2), streams()),
            of_heads,
            lambda: fused_activation.backward(kind, rest, zeros(1, ROWS, width + wide), width, torch.empty_like(rest)),
        ]
    return found


def _adapted(precision: Precision, width: int, rank: int, learns: bool, dora: bool, device: torch.device) -> None:
    """Weights of a few rows, dequantized without and with adapters."""
    kind = precision.kind if precision.quantized else "plain"
    own = torch.float32 if learns else precision.dtype

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=own, device=device).requires_grad_(learns)

    lora = Lora(zeros(rank, width), zeros(ROWS, rank), torch.ones((), device=device), None)
    shape, count = (3 * ROWS, width), 3 * ROWS * width
    stored, scale, nested = torch.zeros(shape, dtype=precision.dtype, device=device), None, None
    if kind == "int8":
        stored, scale = stored.to(torch.int8), torch.ones(3 * ROWS, device=device)
    elif kind != "plain":
        stored = torch.zeros(count // 2, 1, dtype=torch.uint8, device=device)
        scale = torch.ones(count // 64, device=device)
        if precision.double_quant:
            outer, code = (torch.ones(size, device=device) for size in (-(-count // 64 // 256), 256))
            nested = outer, code, torch.ones(3, device=device)
            scale = scale.to(torch.uint8)
    stack = Stack(kind, shape, (ROWS,) * 3, stored, scale, nested, None)
    if kind != "plain":
        dequantize(stack, precision.dtype)
        folded(stack, None, precision.dtype)
    for count in (1, 3):  # layers that read one input
        thin = thin_of(Linear(stack._replace(widths=(ROWS,) * count), ((lora,),) * count), precision.dtype)
        assert thin is not None
        outputs, inner = (torch.zeros(ROWS, size, dtype=precision.dtype, device=device) for size in thin.up.shape)
        gain = torch.ones(len(thin.up), device=device) if dora else None
        biases = (None,) if gain is None else (None, torch.zeros_like(outputs[0]))
        for bias in biases:
            add_product(outputs, inner, thin.up.detach(), gain, bias)
            if learns and gain is not None:
                gain_backward(outputs, outputs, gain, bias, 0)
