"""The Triton kernels that unpack weights, against bitsandbytes' own kernels: on a GPU."""

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from infer.fast.dequantize import dequantize_4bit
from infer.fast.unpack_8bit import LIMITS, rotated, unpack_8bit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROWS, COLUMNS = (128, 256, 384), 512


def layers() -> list[Tensor]:
    noise = torch.Generator("cuda").manual_seed(0)
    return [0.02 * torch.randn(rows, COLUMNS, device="cuda", generator=noise) for rows in ROWS]


def stacked(
    kind: str, nested: bool
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]:
    """Several layers quantized by bitsandbytes, stored behind each other, and what it dequantizes them to, in fp32."""
    packed = [bnb.quantize_4bit(each, quant_type=kind, compress_statistics=nested, blocksize=64) for each in layers()]
    states = [state for _, state in packed]
    extra: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if nested:
        outer = torch.cat([state.state2.absmax for state in states])
        extra = outer, states[0].state2.code, torch.stack([state.offset for state in states])
    stored, scale = torch.cat([codes for codes, _ in packed]), torch.cat([state.absmax for state in states])
    return (stored, scale, *extra), torch.cat([bnb.dequantize_4bit(codes, state) for codes, state in packed])


ENDS = [sum(ROWS[: i + 1]) * COLUMNS // 64 for i in range(len(ROWS))]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_dequantized_to_bitsandbytes_values(kind: str, nested: bool, dtype: torch.dtype) -> None:
    parts, expected = stacked(kind, nested)
    found = dequantize_4bit(*parts, ENDS, kind, [sum(ROWS), COLUMNS], dtype, 0)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("products", ["fp8", "int8"])
def test_eight_bits_are_those_of_bitsandbytes_values(kind: str, nested: bool, across: bool, products: str) -> None:
    parts, values = stacked(kind, nested)
    if products == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a card with fp8")
    rows = values.T.contiguous() if across else values
    if products == "int8":
        rows = rotated(rows.bfloat16().float())  # the rotation's own product takes bf16
    scales = rows.abs().amax(1) / LIMITS[products]
    found = unpack_8bit(*parts, ENDS, kind, [sum(ROWS), COLUMNS], scales, products, across).float()
    expected = rows / scales[:, None]
    exponents = torch.zeros_like(expected).int() if products == "int8" else torch.frexp(expected).exponent - 4
    steps = torch.ldexp(torch.ones_like(expected), exponents.clamp(min=-9))  # between neighbours of 8 bits
    assert found.shape == expected.shape and ((found - expected).abs() <= 0.501 * steps).all()
