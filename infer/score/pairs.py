"""How far a picture is from another one with the same seed, and scores of the user's own by dotted path."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infer.report.results import Scores
from infer.score.drawn import Drawn
from infer.score.judges import Score

Pair = Callable[[Image.Image, Image.Image], float]
Key = tuple[str, str | None, str, int]


def key_of(row: Drawn) -> Key:
    """What tells a row's picture from the others: precision, adapter, prompt with its references, and seed."""
    return row.precision, row.adapter, row.asked, row.seed


def to_pixels(picture: Image.Image) -> Tensor:
    """[1, 3, height, width] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]


def distance(picture: Image.Image, reference: Image.Image) -> Scores:
    """PSNR in dB (None for equal pictures, where it is infinite) and SSIM in [-1, 1] of two pictures of one size."""
    # with scipy it takes a second to import, which every training would pay
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = to_pixels(picture), to_pixels(reference)
    ssim = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(ssim, Tensor)
    equal = bool((a == b).all())
    return {"psnr": None if equal else float(peak_signal_noise_ratio(a, b, data_range=1.0)), "ssim": float(ssim)}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| over all their elements."""
    reference = reference.float()
    return float((value.float() - reference).norm() / reference.norm())


def open_picture(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def score_pairs(
    rows: Sequence[Drawn], folder: Path, latents: dict[Key, Tensor], reference: str | None, lpips: Pair | None
) -> None:
    """Fill in each row's distance from the picture of the reference precision (`_bf16`) and from the one without the
    adapter (`_base`): PSNR, SSIM, the latents' relative error, and LPIPS if there is one.

    A picture's distance from itself is None.
    """
    pictures = {key_of(row): folder / row.image for row in rows}
    adapted = any(row.adapter for row in rows)
    names = ["psnr", "ssim", "latents", *(["lpips"] if lpips else [])]
    for row in rows:
        key = key_of(row)
        others: dict[str, Key] = {}
        if reference is not None:
            others[f"_{reference}"] = reference, row.adapter, row.asked, row.seed
        if adapted:
            others["_base"] = row.precision, None, row.asked, row.seed
        picture = open_picture(pictures[key])
        for suffix, other in others.items():
            scores: Scores = dict.fromkeys(names)
            if other != key:
                scores = distance(picture, open_picture(pictures[other]))
                scores["latents"] = relative_error(latents[key], latents[other])
                if lpips is not None:
                    scores["lpips"] = lpips(picture, open_picture(pictures[other]))
            row.scores.update({name + suffix: value for name, value in scores.items()})


def score_prompts(rows: Sequence[Drawn], folder: Path, scores: dict[str, Score]) -> None:
    """Fill in each row's scores of picture and prompt."""
    for row in rows:
        picture = open_picture(folder / row.image)
        row.scores.update({name: float(score(picture, row.prompt)) for name, score in scores.items()})
