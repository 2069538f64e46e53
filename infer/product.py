"""A product that is added to what is there: one operator, one pass over the sum.

`y + x @ w.T` writes the product and reads it again with y. torch.compile keeps this one in place, on a part of a larger
tensor too; `torch.addmm` would copy y first.
"""

import torch
from torch import Tensor


@torch.library.custom_op("flux_lora::add_product", mutates_args=("y",))
def add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y [..., out] += x [..., in] weight^T, weight [out, in]; has no gradient. The rows of y are equally far apart."""
    y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), weight.T)


@add_product.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    return None
