"""How far a set of pictures is from another one, for small sets: KID and CMMD, and the nearest picture of all.

FID needs thousands of pictures; both measures here are unbiased at any number (Bińkowski et al. 2018; Jayasumana et al.
2024). Their limits come from the jackknife over pictures, since a bootstrap draws pictures twice, and a picture is
close to itself.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from infer.report.results import Estimate

SIDE = 32  # pixels at which pictures are compared with the training set
Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """KID's kernel of features [n, d] and [m, d]: (a . b / d + 1)^3, [n, m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """CMMD's kernel of CLIP embeddings of length 1: exp(-|a - b|^2 / (2 x 10^2)), [n, m], times its scale of 1000."""
    return 1000 * torch.exp(-torch.cdist(a, b).square() / 200)


def squared_distance(a: Tensor, b: Tensor, kernel: Kernel) -> Estimate:
    """The unbiased squared maximum mean discrepancy of features [n, d] and [m, d], with 95 % limits from leaving out
    each picture in turn; it can be below zero. n and m are at least 2, and the limits need 3.

    Gretton et al. 2012, eq. 3: mean of k(a, a') + mean of k(b, b') - 2 mean of k(a, b).
    """
    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    within_a, within_b, across = (_row_sums(kernel(x, y), x is y) for x, y in ((a, a), (b, b), (a, b)))
    columns = kernel(a, b).sum(0)
    sums = within_a.sum(), within_b.sum(), across.sum()

    def value(left: int, right: int, in_a: Tensor, in_b: Tensor, between: Tensor) -> Tensor:
        return in_a / (left * (left - 1)) + in_b / (right * (right - 1)) - 2 * between / (left * right)

    whole = float(value(n, m, *sums))
    if min(n, m) < 3:
        return Estimate(whole, None, None, n)
    without_a = value(n - 1, m, sums[0] - 2 * within_a, sums[1], sums[2] - across)
    without_b = value(n, m - 1, sums[0], sums[1] - 2 * within_b, sums[2] - columns)
    variance = sum((len(x) - 1) / len(x) * float((x - x.mean()).square().sum()) for x in (without_a, without_b))
    margin = 1.96 * math.sqrt(variance)
    return Estimate(whole, whole - margin, whole + margin, n)


def _row_sums(values: Tensor, itself: bool) -> Tensor:
    """Row sums, without the diagonal if a set is compared with itself."""
    return values.sum(1) - (values.diagonal() if itself else 0)


def thumbnail(picture: Image.Image, shape: float) -> Tensor:
    """A picture averaged to SIDE x SIDE pixels, [3 * SIDE * SIDE] in [0, 1]: its middle part of the given shape
    (width / height)."""
    width, height = picture.size
    across, down = min(width, round(height * shape)), min(height, round(width / shape))
    left, top = (width - across) // 2, (height - down) // 2
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + across, top + down))
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).flatten()


def nearest(thumbnails: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For thumbnails [n, d] the least root mean square difference to one of [m, d], and which one that is, both [n]."""
    distance, index = torch.cdist(thumbnails, others).min(1)
    return distance / math.sqrt(thumbnails.shape[1]), index


def nearest_cosine(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For features [n, d] the largest cosine to one of [m, d], and which one that is, both [n]."""
    similarity, index = (functional.normalize(features) @ functional.normalize(others).T).max(1)
    return similarity, index
