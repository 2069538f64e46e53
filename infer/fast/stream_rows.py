"""Rows of two streams, text and picture, that Triton kernels read and write as if they lay behind each other."""

from functools import lru_cache
from typing import Any


@lru_cache
def stream_rows() -> tuple[Any, Any]:
    """What kernels call: `load_row`, in fp32, and `store_row`.

    Row `row` of [batch, tokens, width] is one of `first` [batch, early, width] where its token is below `early`, else
    of `second` [batch, tokens - early, width]. A single stream is given as both, with early = tokens.
    """
    # Triton comes with torch's CUDA builds alone
    import triton
    import triton.language as tl

    @triton.jit
    def places(row, column, early, tokens, width):  # type: ignore[no-untyped-def]
        batch, token = row // tokens, row % tokens
        behind = (batch * (tokens - early) + token - early) * width + column
        return (batch * early + token) * width + column, behind, token < early

    @triton.jit
    def load_row(first, second, row, column, within, early, tokens, width):  # type: ignore[no-untyped-def]
        at, behind, begins = places(row, column, early, tokens, width)
        x = tl.load(first + at, mask=within & begins, other=0.0).to(tl.float32)
        return x + tl.load(second + behind, mask=within & (begins == 0), other=0.0).to(tl.float32)

    @triton.jit
    def store_row(first, second, x, row, column, within, early, tokens, width):  # type: ignore[no-untyped-def]
        at, behind, begins = places(row, column, early, tokens, width)
        tl.store(first + at, x.to(first.dtype.element_ty), mask=within & begins)
        tl.store(second + behind, x.to(second.dtype.element_ty), mask=within & (begins == 0))

    return load_row, store_row
