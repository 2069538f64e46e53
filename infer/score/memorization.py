"""Pictures against the training images: how alike they are, how far the two sets are apart, and whether one was learned
by heart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from infer.report.results import Estimate, References, Variant
from infer.sample.picture import decode
from infer.score.drawn import Drawn
from infer.score.judges import list_pictures
from infer.score.kid_cmmd import Kernel, gaussian, nearest, nearest_cosine, polynomial, squared_distance, thumbnail
from infer.score.networks import Embed, Loaded

CHUNK = 64  # pictures decoded at once


@dataclass(frozen=True)
class SetScore:
    """How far all pictures of one (precision, adapter) are from the training images."""

    variant: Variant
    name: str
    distance: Estimate


def score_likeness(
    rows: Sequence[Drawn], folder: Path, references: str, networks: Loaded
) -> tuple[References, list[SetScore]]:
    """Fill in each row's likeness to the training images; returns what is known of these, and KID and CMMD where their
    networks are there.

    Rows get `nearest_rms`, the root mean square difference to the nearest image at 32 x 32 pixels, whose middle part of
    the row's shape is taken, and that image's name as `nearest`; with networks `nearest_dino` (largest cosine),
    `dino` and `clip_i` (mean cosine to all; Ruiz et al. 2023). The same two of the training images among themselves say
    what is usual.
    """
    files = list_pictures(references)
    pictures = [folder / row.image for row in rows]
    known = References(references, len(files))
    width, height = _open(pictures[0]).size  # of all of them
    drawn = torch.stack([thumbnail(_open(file), width / height) for file in pictures])
    trained_on = torch.stack([thumbnail(_open(file), width / height) for file in files])
    distances, indices = nearest(drawn, trained_on)
    for row, distance, index in zip(rows, distances, indices, strict=True):
        row.scores["nearest_rms"] = float(distance)
        row.nearest = str(files[int(index)].relative_to(references))
    if len(files) > 1:
        known.nearest_rms = _usual(nearest, trained_on)
    sets: list[SetScore] = []
    if networks.dino is not None:
        features, others = _embedded(networks.dino, pictures), _embedded(networks.dino, files)
        best, _ = nearest_cosine(features, others)
        for row, mean, cosine in zip(rows, _mean_cosines(features, others), best, strict=True):
            row.scores["dino"], row.scores["nearest_dino"] = float(mean), float(cosine)
        if len(files) > 1:
            known.nearest_dino = _usual(nearest_cosine, others)
        sets += _set_scores(rows, "kid", polynomial, features, others)
    if networks.clip is not None:
        features, others = _embedded(networks.clip, pictures), _embedded(networks.clip, files)
        for row, mean in zip(rows, _mean_cosines(features, others), strict=True):
            row.scores["clip_i"] = float(mean)
        sets += _set_scores(rows, "cmmd", gaussian, features, others)
    return known, sets


def _open(file: Path) -> Image.Image:
    """A picture as the trainer sees it: upright, in sRGB, transparency over white."""
    return decode(file.read_bytes(), str(file))


def _embedded(embed: Embed, files: list[Path]) -> Tensor:
    parts = [embed([_open(file) for file in files[i : i + CHUNK]]) for i in range(0, len(files), CHUNK)]
    return torch.cat(parts)


def _mean_cosines(features: Tensor, others: Tensor) -> Tensor:
    """For features [n, d] the mean cosine to all of [m, d], [n]."""
    return (functional.normalize(features) @ functional.normalize(others).T).mean(1)


def _usual(closest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], features: Tensor) -> float:
    """The median, over the training images [n, d], of each one's closeness to the closest other one."""
    others = (torch.cat([features[:i], features[i + 1 :]]) for i in range(len(features)))
    found = [closest(features[i : i + 1], rest)[0] for i, rest in enumerate(others)]
    return float(torch.cat(found).median())


def _set_scores(rows: Sequence[Drawn], name: str, kernel: Kernel, features: Tensor, others: Tensor) -> list[SetScore]:
    """The distance of each (precision, adapter) whose pictures, like the training images, are two or more."""
    found = []
    for variant in dict.fromkeys(row.variant for row in rows):
        chosen = [i for i, row in enumerate(rows) if row.variant == variant]
        if min(len(chosen), len(others)) >= 2:
            found.append(SetScore(variant, name, squared_distance(features[chosen], others, kernel)))
    return found
