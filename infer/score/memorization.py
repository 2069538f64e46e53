"""Pictures against the training images: how alike they are, how far the two sets are apart, and whether one was learned
by heart.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from infer.sample.picture import decode
from infer.score.bootstrap import Interval
from infer.score.judges import list_pictures
from infer.score.kid_cmmd import gaussian, nearest, nearest_cosine, polynomial, squared_distance, thumbnail
from infer.score.networks import Embed, Loaded
from infer.score.pairs import Row

CHUNK = 64  # pictures decoded at once


def _open(file: Path) -> Image.Image:
    """A picture as the trainer sees it: upright, in sRGB, transparency over white."""
    return decode(file.read_bytes(), str(file))


def _embedded(embed: Embed, files: list[Path]) -> Tensor:
    parts = [embed([_open(file) for file in files[i : i + CHUNK]]) for i in range(0, len(files), CHUNK)]
    return torch.cat(parts)


def score_likeness(rows: list[Row], folder: Path, references: str, networks: Loaded) -> dict[str, Any]:
    """Fill in each row's likeness to the training images, and give what is known of these.

    Rows get `nearest_rms` (root mean square difference to the nearest image at 32 x 32 pixels, of which the middle part
    of the row's shape is taken), that image's name as `nearest`, and with networks `nearest_dino` (largest cosine),
    `dino` and `clip_i` (mean cosine to all; Ruiz et al. 2023). The same two of the training images among themselves say
    what is usual.
    """
    files = list_pictures(references)
    pictures = [folder / row["image"] for row in rows]
    known: dict[str, Any] = {"folder": references, "count": len(files)}
    width, height = _open(pictures[0]).size  # of all of them
    own = torch.stack([thumbnail(_open(file), width / height) for file in pictures])
    theirs = torch.stack([thumbnail(_open(file), width / height) for file in files])
    distances, indices = nearest(own, theirs)
    for row, distance, index in zip(rows, distances, indices, strict=True):
        row["scores"]["nearest_rms"] = float(distance)
        row["nearest"] = str(files[int(index)].relative_to(references))
    if len(files) > 1:
        known["nearest_rms"] = _usual(nearest, theirs)
    for name, nearest_name, embed in (("dino", "nearest_dino", networks.dino), ("clip_i", None, networks.clip)):
        if embed is None:
            continue
        features, others = _embedded(embed, pictures), _embedded(embed, files)
        cosines = (functional.normalize(features) @ functional.normalize(others).T).mean(1)
        best, _ = nearest_cosine(features, others)
        for i, row in enumerate(rows):
            row["scores"][name] = float(cosines[i])
            if nearest_name:
                row["scores"][nearest_name] = float(best[i])
        if nearest_name and len(files) > 1:
            known[nearest_name] = _usual(nearest_cosine, others)
        _score_sets(rows, name, features, others, known)
    return known


def _usual(closest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], features: Tensor) -> float:
    """The median, over the training images [n, d], of each one's closeness to the closest other one."""
    others = (torch.cat([features[:i], features[i + 1 :]]) for i in range(len(features)))
    found = [closest(features[i : i + 1], rest)[0] for i, rest in enumerate(others)]
    return float(torch.cat(found).median())


def _score_sets(rows: list[Row], name: str, features: Tensor, others: Tensor, known: dict[str, Any]) -> None:
    """KID on DINO's features and CMMD on CLIP's, for each (precision, adapter)."""
    kernel, title = (polynomial, "kid") if name == "dino" else (gaussian, "cmmd")
    sets: list[dict[str, Any]] = known.setdefault("sets", [])
    for precision, adapter in dict.fromkeys((row["precision"], row["adapter"]) for row in rows):
        chosen = [i for i, row in enumerate(rows) if (row["precision"], row["adapter"]) == (precision, adapter)]
        if min(len(chosen), len(others)) < 2:
            continue
        found: Interval = squared_distance(features[chosen], others, kernel)
        sets.append({"precision": precision, "adapter": adapter, "score": title, **found._asdict()})
