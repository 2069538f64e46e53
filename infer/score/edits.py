"""Pictures of prompts with references: what should not have changed, what should, and how it should be."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from infer.sample.edit import Edit
from infer.sample.picture import decode
from infer.score.drawn import Drawn
from infer.score.pairs import Pair, distance, open_picture


def same_shape(picture: Image.Image, size: tuple[int, int]) -> bool:
    """Whether a picture scaled to `size`, width and height, keeps its shape within one of its pixels."""
    scale = min(picture.width / size[0], picture.height / size[1])
    return all(abs(own - scale * side) <= max(1, scale) for own, side in zip(picture.size, size, strict=True))


def read_fitting(file: str, size: tuple[int, int], what: str) -> Image.Image:
    """A picture scaled to `size`, width and height.

    Raises:
        ValueError: it cannot be read, or has another shape.
    """
    picture = decode(Path(file).read_bytes(), file)
    if not same_shape(picture, size):
        raise ValueError(
            f"edits: the {what} {file} is {picture.width}x{picture.height}, and the pictures are drawn at "
            f"{size[0]}x{size[1]}; give both the same shape, by sampling.width and sampling.height"
        )
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def check_scored(edits: Sequence[Edit], size: tuple[int, int]) -> None:
    """See that masks and targets, and the references that a mask is of, can be compared with pictures of a size.

    Raises:
        ValueError: one has another shape; or a mask leaves nothing of the picture, or all.
    """
    for edit in edits:
        if edit.target is not None:
            read_fitting(edit.target, size, "target")
        if edit.mask is not None:
            read_fitting(edit.references[0], size, "first reference")
            share = weights_of(edit.mask, size).mean()
            if not 0 < share < 1:
                colour = "black" if share == 0 else "white"
                raise ValueError(
                    f"edits: the mask {edit.mask} is {colour} all over; paint white where the edit belongs"
                )


def weights_of(mask: str, size: tuple[int, int]) -> NDArray[np.float64]:
    """A mask at the pictures' size, [height, width, 1], 1 where the edit belongs."""
    picture = read_fitting(mask, size, "mask").convert("L")
    return np.asarray(picture, dtype=np.float64)[..., None] / 255


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A reference at the drawn pictures' size, to be looked at: scaled, on white where its shape is another one."""
    if same_shape(picture, size):
        return picture.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="white")


def score_edits(rows: Sequence[Drawn], folder: Path, edits: Mapping[str, Edit], lpips: Pair | None) -> None:
    """Fill in the scores of rows whose prompt has references. edits: by `Row.asked`.

    With a mask: `kept_psnr`, in dB over the pixels outside of it against the first reference (None where they are
    equal); `kept_lpips`, of the picture with the reference put within the mask; `changed`, the root mean square
    difference within it, from 0 to 1. With a target: `target_psnr`, `target_ssim` and `target_lpips`.
    """
    for row in rows:
        edit = edits.get(row.asked)
        if edit is None:
            continue
        picture = open_picture(folder / row.image)
        if edit.mask is not None:
            reference = read_fitting(edit.references[0], picture.size, "first reference")
            weights = weights_of(edit.mask, picture.size)
            drawn, before = (np.asarray(each, dtype=np.float64) / 255 for each in (picture, reference))
            squares = (drawn - before) ** 2
            outside = float((squares * (1 - weights)).sum() / (3 * (1 - weights).sum()))
            row.scores["kept_psnr"] = None if outside == 0 else -10 * float(np.log10(outside))
            row.scores["changed"] = float((squares * weights).sum() / (3 * weights.sum())) ** 0.5
            if lpips is not None:
                mixed = (drawn * (1 - weights) + before * weights) * 255
                row.scores["kept_lpips"] = lpips(Image.fromarray(mixed.round().astype(np.uint8)), reference)
        if edit.target is not None:
            target = read_fitting(edit.target, picture.size, "target")
            row.scores |= {f"target_{name}": value for name, value in distance(picture, target).items()}
            if lpips is not None:
                row.scores["target_lpips"] = lpips(picture, target)
