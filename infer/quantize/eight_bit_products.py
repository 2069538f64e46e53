"""Products in 8 bits (`precision.products`): which cards multiply so, and which commands do not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infer.quantize.precision import Precision

if TYPE_CHECKING:
    import torch


def without_products(precision: Precision) -> dict[str, Any]:
    """The settings but `products`: what the text encoders, and whatever runs on diffusers' own layers, depend on."""
    return {name: value for name, value in asdict(precision).items() if name != "products"}


def check_card(products: str, device: torch.device) -> None:
    """See that a device multiplies in 8 bits.

    Raises:
        ValueError: it does not.
    """
    if products == "bf16" or device.type == "cpu":
        return
    least, cards = {"fp8": ((8, 9), "RTX 40, L40S, H100 or later"), "int8": ((8, 0), "RTX 30, A100 or later")}[products]
    if device.type != "cuda":
        raise ValueError(
            f"precision.products={products} needs a CUDA device, not {device}; set precision.products=bf16"
        )
    import torch

    found = torch.cuda.get_device_capability(device)
    if found < least:
        mend = "int8 or bf16" if products == "fp8" and found >= (8, 0) else "bf16"
        raise ValueError(
            f"precision.products={products} needs {cards} (compute capability {least[0]}.{least[1]}), and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; set precision.products={mend}"
        )


def refuse_products(precision: Precision, command: str) -> None:
    """Raises:
    ValueError: products are in 8 bits, and the command multiplies by no fast path.
    """
    if precision.products != "bf16":
        raise ValueError(
            f"precision.products={precision.products} has no effect on {command}; leave precision.products at bf16"
        )
