"""Products in fp16 beside a residual stream in fp32: how cards without bf16 (before Ampere) train and draw.

FLUX's activations pass fp16's largest number, 65504, and its gradients its smallest. So every row that goes into a
product, of activations and of gradients alike, is divided by its largest magnitude and what comes out is multiplied by
it again, in fp32. Nothing is clipped, and no scale of the loss has to be found or stored. The residual stream, norms,
biases, adapters and the embedders' and modulations' activations are fp32; weights are fp16 or quantized.

Attention takes memory-efficient kernels, which such cards have (flash attention 2 and cuDNN's need Ampere): queries and
keys are bounded by their norms, values and the gradient are scaled head by head.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from infer.quantize.precision import kind_of
from infer.quantize.storage import int8_values, scales_of

LEAST = 2.0**-100  # a row of zeros is divided by it
HEAD = 8.0  # largest magnitude of a head's values, and of its gradient: sums over 8,000 tokens stay below 65504


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of fp16 matrices, with sums in fp32."""
    if a.is_cuda:
        return a @ b
    return (a.float() @ b.float()).half()  # CPUs are a hundred times slower in fp16, and round the same


def scaled_product(x: Tensor, weights: Tensor) -> Tensor:
    """x [..., in] in fp32 times fp16 weights [in, out], in fp32.

    A scaled row's norm is below sqrt(in), so sums stay within fp16 where no column of the weights has a norm of 500.
    """
    scale = x.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    return _multiply((x / scale).half(), weights).float() * scale


class _Attention(torch.autograd.Function):
    """Attention of fp16 queries, keys and values, with a gradient in fp16 of its own scale."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = _head_scale(v)
        half = q.half(), k.half(), (v / size).half()
        out, *rest = _attend(*half)
        ctx.save_for_backward(*half, size, out, *rest)
        return out.float() * size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, size, out, *rest = ctx.saved_tensors
        gradient = gradient * size
        scale = _head_scale(gradient)
        dq, dk, dv = _attend_back((gradient / scale).half(), q, k, v, out, *rest)
        return dq.float() * scale, dk.float() * scale, dv.float() * (scale / size)


def _head_scale(x: Tensor) -> Tensor:
    """x [batch, heads, tokens, width] -> [batch, heads, 1, 1], by which its largest magnitude is HEAD."""
    return (x.abs().amax((-2, -1), keepdim=True) / HEAD).clamp_min(LEAST)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and what else the gradient needs. This kernel by name: no other is chosen on newer cards."""
    if q.is_cuda:
        found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return found
    out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.float(), k.float(), v.float())
    return out.half(), logs


def _attend_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *random: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        back = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        dq, dk, dv, _ = back(gradient, q, k, v, None, out, logs, *random, 0.0, [True, True, True, False])
        return dq, dk, dv
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = back(*(x.float() for x in (gradient, q, k, v, out)), logs, 0.0, False)
    return tuple(x.half() for x in found)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [batch, heads, tokens, width] in fp32 -> the same of the attention's output; products in fp16."""
    out: Tensor = _Attention.apply(q, k, v)
    return out


class _Product(torch.autograd.Function):
    """x W^T of a frozen layer whose fp16 weights are made for each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return scaled_product(x, _weights(layer).T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return scaled_product(gradient, _weights(ctx.layer)), None


def _weights(layer: Any) -> Tensor:
    """A layer's weights [out, in] in fp16."""
    import bitsandbytes as bnb

    weights: Tensor = layer.weight.detach()
    kind = kind_of(layer)
    if kind == "int8":
        weights = int8_values(weights, scales_of(layer), torch.float32)
    elif kind is not None:
        weights = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weights.half()


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x.float(), layer)
    return y if layer.bias is None else y + layer.bias


def _llm_int8(multiply: Any, layer: nn.Linear, x: Tensor) -> Tensor:
    """LLM.int8 of rows that fit fp16; the others are scaled until they do."""
    scale = (x.abs().amax(-1, keepdim=True) / 32768).clamp_min(1.0)
    y: Tensor = multiply(x / scale)
    return y * scale if layer.bias is None else (y - layer.bias) * scale + layer.bias


def compute_in_half(model: nn.Module, llm_int8: bool) -> None:
    """Have a frozen transformer, loaded in fp16, carry fp32 and multiply in fp16.

    llm_int8: int8 layers keep bitsandbytes' own products (of inference alone: gradients vanish in fp16).
    """
    for module in model.modules():
        linear = isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (linear and name == "weight"):
                parameter.data = parameter.data.float()
        if not linear:
            continue
        layer: Any = module
        if kind_of(layer) == "int8" and llm_int8:
            layer.forward = partial(_llm_int8, layer.forward, layer)
        else:
            layer.forward = partial(_forward, layer)
    model._compute_dtype = torch.float32  # type: ignore[assignment]  # of what goes in and comes out
    model._in_half = True  # type: ignore[assignment]
