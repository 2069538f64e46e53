"""How far a picture is from another one with the same seed, and scores of the user's own by dotted path."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Score = Callable[[Image.Image, str], float]


def _pixels(picture: Image.Image) -> Tensor:
    """[1, 3, height, width] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]


def distance(picture: Image.Image, reference: Image.Image) -> dict[str, float | None]:
    """PSNR in dB (None for equal pictures, where it is infinite) and SSIM in [-1, 1] of two pictures of one size."""
    a, b = _pixels(picture), _pixels(reference)
    ssim = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(ssim, Tensor)
    equal = bool((a == b).all())
    return {"psnr": None if equal else float(peak_signal_noise_ratio(a, b, data_range=1.0)), "ssim": float(ssim)}


def find_scores(names: dict[str, str]) -> dict[str, Score]:
    """Named dotted paths -> functions (picture, prompt) -> number.

    Raises:
        ValueError: a path leads to no function.
    """
    from hydra.utils import get_method

    found: dict[str, Score] = {}
    for name, path in names.items():
        try:
            found[name] = get_method(path)
        except Exception as error:  # whatever importing the user's module raises
            raise ValueError(
                f"scores.{name} is {path!r}, which is no function that can be imported ({error}); "
                "write module.function of (picture, prompt) -> number"
            ) from error
    return found


def open_picture(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")
