"""What a check measures, and how far it may be from what it is compared with."""

import math

import numpy as np
from PIL import Image
from torch import Tensor
from torch import cat as join

Figures = dict[str, tuple[float, str, float]]
"""By what is compared: the value, <= or >=, and the limit."""

# the largest relative error, or for decibels the least. bf16 is rounded at other places on each path; the gradients of
# diffusers' and PEFT's own layers are 1.7 to 2.6 % from exact ones with the bundled model
GRADIENT, LOSS, LEARNED, PICTURE = 0.03, 0.02, 0.15, 35.0

ZEROS = ("lora_B", "lokr_w1", "hada_w2_b", "oft_R")  # PEFT's factors that begin as zeros, by their names in files


def share(value: float, sign: str, limit: float) -> float:
    """A figure as a part of its limit: up to 1 is within it."""
    if sign == ">=":
        return limit / value if value > 0 else 1e9
    if value != value:  # NaN is beyond every limit
        return 1e9
    return value / limit if limit else (0.0 if value == 0 else 1e9)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    a, b = (join([each.double().cpu().flatten() for each in part]) for part in (found, expected))
    return float((a - b).norm() / b.norm())


def decibels(found: Image.Image, expected: Image.Image) -> float:
    """PSNR of a picture against another; 99 where they are equal."""
    a, b = (np.asarray(each.convert("RGB"), dtype=np.float64) / 255 for each in (found, expected))
    error = float(np.square(a - b).mean())
    return min(99.0, -10 * math.log10(error)) if error else 99.0


def nearness(found: list[Image.Image], expected: list[Image.Image]) -> float:
    """Decibels of the worst of some pictures."""
    return min(decibels(a, b) for a, b in zip(found, expected, strict=True))


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far two adapters of one kind are apart, of what was learned in the factors that began as zeros."""
    assert found.keys() == expected.keys()
    began = [value for key, value in expected.items() if any(name in key for name in ZEROS)]
    moved = sum(float(value.square().sum()) for value in began)
    return math.sqrt(sum(float((found[key] - expected[key]).square().sum()) for key in found) / moved)
