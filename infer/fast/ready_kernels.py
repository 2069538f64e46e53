"""The kernels of fused blocks, compiled in a thread while a model is loaded.

Triton compiles a kernel when it is first called, in half a second, and keeps it on disk (infer/device/compiler.py).
What it compiles depends on dtypes and on which numbers are multiples of 16, not on sizes: so calls of a few rows
compile the kernels that a whole step needs.
"""

from collections.abc import Mapping
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from infer.device.compiler import prepare_compiler
from infer.fast.fold import folded
from infer.fast.fused_activation import activated
from infer.fast.fused_gate import gated
from infer.fast.fused_heads import Heads, Rows, heads_and_rest, heads_of
from infer.fast.fused_norm import normed
from infer.fast.kept_attention import kept_attention
from infer.fast.memory import Memory
from infer.fast.thin import thin_of
from infer.fast.weights import Linear, Lora, Stack, dequantize
from infer.quantize.precision import Precision

ROWS = 32
_threads: list[Thread] = []


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
    own = memory.kernels(device) and not dora and precision.dtype != torch.float16
    prepare_compiler(device, pool=not own)
    if own and device.type == "cuda":
        before = _threads[-1] if _threads else None
        given = before, config, precision, rank, learns, device
        _threads.append(Thread(target=_compile, args=given, name="kernels", daemon=True))
        _threads[-1].start()


def wait() -> None:
    """Until what was begun is done: two threads would compile a kernel twice."""
    while _threads:
        _threads.pop().join()


def _compile(
    before: Thread | None,
    config: Mapping[str, Any],
    precision: Precision,
    rank: int,
    learns: bool,
    device: torch.device,
) -> None:
    if before is not None:
        before.join()
    heads, each = config["num_attention_heads"], config["attention_head_dim"]
    width, dtype = heads * each, precision.dtype
    swiglu = "pooled_projection_dim" not in config  # FLUX.2

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).requires_grad_(learns)

    with torch.cuda.stream(torch.cuda.Stream(device)):
        shift, scale, gate = zeros(1, 3 * width).detach().chunk(3, dim=-1)
        txt, img = zeros(1, ROWS, width), zeros(1, ROWS, width)
        x, *streams = normed(shift, scale, txt, img)
        angles = torch.zeros(2 * ROWS, each, device=device)
        norm = zeros(each).detach()
        products = zeros(1, ROWS, 3 * width), zeros(1, ROWS, 3 * width)
        joint = heads_of(Heads(heads, (norm,) * 4, angles, angles), *products)
        kind, hidden = ("swiglu", 6) if swiglu else ("gelu", 4)
        rows, product = Rows(), zeros(1, 2 * ROWS, (3 + hidden) * width)
        *_, rest = heads_and_rest(Heads(heads, (norm,) * 2, angles, angles), product, rows)
        y = activated(kind, rest, kept_attention(*joint, False), rows, 3 * width)
        out = gated(gate, y[..., :width] + x, tuple(streams))
        adapters = _adapted(precision, width, rank, learns, device)
        if learns:
            torch.autograd.backward([each.sum() for each in (*out, *adapters)])
    torch.cuda.empty_cache()


def _adapted(precision: Precision, width: int, rank: int, learns: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Weights of a few rows, dequantized without and with adapters; returns the latter's two thin matrices."""
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
    thin = thin_of(Linear(stack, ((lora,),) * 3), precision.dtype)
    assert thin is not None
    if kind != "plain":
        dequantize(stack, precision.dtype)
        folded(stack, None, precision.dtype)
        folded(stack, thin._replace(down=thin.down.detach(), up=thin.up.detach()), precision.dtype)
    return thin.down, thin.up
