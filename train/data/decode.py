"""What training needs of a picture beyond its pixels (infer/sample/picture.py): its mask, a hash of it, its size."""

import hashlib
import io

from PIL import Image

from infer.sample.picture import FORMATS, MOST_PIXELS, decode

DECODING = 2  # to be raised when the same bytes are decoded to other pixels than before
# pictures too, which are not: a folder that holds them should not lose them without a word
UNREAD = (
    ".heic",
    ".heif",
    ".jxl",
    ".svg",
    ".psd",
    ".xcf",
    ".exr",
    ".hdr",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
)


def decode_mask(content: bytes, name: str, size: tuple[int, int], most_pixels: int = MOST_PIXELS) -> Image.Image:
    """A mask in greys ("L"), scaled to `size`, the width and height of its upright picture; transparent is black.

    Raises:
        ValueError: it cannot be decoded, has another shape than its picture, or is black all over.
    """
    mask = decode(content, name, "black", most_pixels).convert("L")
    if mask.getextrema() == (0, 0):
        raise ValueError(f"{name} is black all over: nothing would be learned; take its picture out, or mend the mask")
    if mask.size == size:
        return mask
    # the same shape within one pixel of the smaller of both
    scale = min(mask.width / size[0], mask.height / size[1])
    if abs(mask.width - scale * size[0]) > max(1, scale) or abs(mask.height - scale * size[1]) > max(1, scale):
        raise ValueError(
            f"{name} is {mask.width}x{mask.height}, but its picture {size[0]}x{size[1]}; give both the same shape"
        )
    return mask.resize(size, Image.Resampling.BILINEAR)


def pixel_hash(picture: Image.Image) -> str:
    """A hash of the decoded pixels: the same for a renamed or re-compressed lossless file, another for any edit."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    rows = max(1, 2**20 // max(1, picture.width))
    for top in range(0, picture.height, rows):  # in strips: all at once would be a copy, and another to join its parts
        digest.update(picture.crop((0, top, picture.width, min(top + rows, picture.height))).tobytes())
    return digest.hexdigest()


def pixels_of(content: bytes) -> int:
    """How many pixels a picture's header says; 0 if it cannot be read, and then decoding says why."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # each format's reader raises other kinds
        return 0
