"""Products of frozen weights in 8 bits: what goes in is rounded row by row, and the stored weights with it.

fp8 (e4m3, Micikevicius et al. 2022) takes Ada's and Hopper's tensor cores, int8 those from Ampere on, of rotated rows
(infer/fast/unpack_8bit.py says why). Each row of activations, and of gradients in the backward pass, has a scale of its
own, and so has each row of the weights. Sums are 32 bits wide. What is stored, the adapters, biases, norms, attention
and the residual stream stay as they are, and what comes out is in the dtype of what went in.

A CPU does the same in plain torch: every value is rounded as on a GPU and multiplied in fp32, so that what 8 bits cost
can be measured anywhere. It saves no time there.
"""

import torch
from torch import Tensor

from infer.fast.int8_kernels import multiply_int8, rotate_round
from infer.fast.round_rows import round_rows, scale_product
from infer.fast.unpack_8bit import LEAST, LIMITS, rotated, rounded, unpack_8bit
from infer.fast.weights import Eight, Stack, dequantize, four_bit_ends


def eight_of(frozen: Stack, products: str, device: torch.device) -> Eight:
    """The scales of a stack's values in 8 bits, found on `device`; the stack may lie elsewhere."""
    weights = dequantize(_on(frozen, device), torch.bfloat16)
    rows, columns = [], torch.full(weights.shape[1:], LEAST, device=device)
    for part in weights.split(1024):  # whole ones in fp32 would be most of what a small card has
        for_rows, for_columns = _turned(part, products, across=False), _turned(part, products, across=True)
        rows.append(for_rows.abs().amax(1).clamp_min(LEAST))
        columns = torch.maximum(columns, for_columns.abs().amax(1))
    limit = LIMITS[products]
    return Eight(products, torch.cat(rows) / limit, columns / limit, torch.ones((), device=device))


def _on(frozen: Stack, device: torch.device) -> Stack:
    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    nested = None if frozen.nested is None else tuple(x.to(device) for x in frozen.nested)
    return frozen._replace(stored=frozen.stored.to(device), scale=there(frozen.scale), nested=nested)  # type: ignore[arg-type]


def _turned(weights: Tensor, products: str, across: bool) -> Tensor:
    """Weights [out, in] in bf16 as they are rounded: in fp32, [in, out] if `across`, rotated for int8."""
    weights = (weights.T if across else weights).float()
    return rotated(weights) if products == "int8" else weights


def product(x: Tensor, frozen: Stack, across: bool, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the weights, [..., out], plus bias; across: a gradient [..., out] times them, [..., in]."""
    eight = frozen.eight
    assert eight is not None
    values, scales = _rounded_rows(x.flatten(0, -2), eight.products)
    own = eight.columns if across else eight.rows
    weights = _weights(frozen, eight, own, across)
    y: Tensor = _multiply(values, weights, scales, own, eight.one, x.dtype, bias)
    return y.view(*x.shape[:-1], -1)


def _rounded_rows(x: Tensor, products: str) -> tuple[Tensor, Tensor]:
    """x [rows, n] in 8 bits, and what each row is multiplied by [rows, 1]."""
    if products == "int8" and x.is_cuda:
        values, scales = rotate_round(x)
        return values, scales
    if x.is_cuda and not torch.compiler.is_compiling():
        return round_rows(x)
    # plain operators for fp8, which torch.compile has a part of what makes x
    turned = rotated(x.float()) if products == "int8" else x.float()
    top, limit = turned.abs().amax(-1, keepdim=True).clamp_min(LEAST), LIMITS[products]
    return rounded(turned * (limit / top), products), top / limit


def _weights(frozen: Stack, eight: Eight, scales: Tensor, across: bool) -> Tensor:
    """In 8 bits, [out, in] or across [in, out]."""
    if not frozen.stored.is_cuda:
        return rounded(
            _turned(dequantize(frozen, torch.bfloat16), eight.products, across) / scales[:, None], eight.products
        )
    outer, code, offsets = frozen.nested or (None, None, None)
    kind, shape, ends = frozen.kind, list(frozen.shape), four_bit_ends(frozen)
    how = kind, shape, scales, eight.products, across
    weights: Tensor = unpack_8bit(frozen.stored, frozen.scale, outer, code, offsets, ends, *how)
    return weights


def _multiply(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, one: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """a [m, k] times b [n, k] transposed, times the scales rows [m, 1] and columns [n], plus bias [n]."""
    if a.is_cuda and a.dtype != torch.int8 and a.shape[1] > b.shape[0]:
        # long sums: cuBLAS is up to 15 % faster without the rows' scales, which what reads y applies on its way
        y = torch._scaled_mm(a, b.T, one, one, out_dtype=dtype, use_fast_accum=True)
        if not torch.compiler.is_compiling():
            return scale_product(y, rows, columns, bias)
        y = (y.float() * rows * columns).to(dtype)
    elif a.is_cuda and a.dtype != torch.int8:
        return torch._scaled_mm(a, b.T, rows, columns[None], bias=bias, out_dtype=dtype, use_fast_accum=True)
    elif a.is_cuda:
        y = multiply_int8(a, b, rows, columns)
    else:
        y = ((a.float() @ b.float().T) * rows * columns).to(dtype)
    return y if bias is None else y.add_(bias)
