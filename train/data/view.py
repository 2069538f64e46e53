"""A crop of a picture as it is trained, without torch."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class View:
    """One crop of one picture at one resolution."""

    height: int
    width: int
    """Pixels after cutting, multiples of 16."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in the upright picture's pixels, before scaling."""
    flip: bool
    """Mirrored, left to right."""


def scaled(picture: Image.Image, view: View) -> Image.Image:
    """What a view shows of an upright picture, at its size, not mirrored yet."""
    return picture.resize((view.width, view.height), Image.Resampling.LANCZOS, box=view.box)
