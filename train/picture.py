"""The bytes of a picture file -> an upright RGB picture, and of a mask file -> its mask."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# files of these are read; of animated ones the first frame
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2")
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
MOST_PIXELS = 2 * 89_478_485  # what Pillow itself refuses to go beyond


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say which picture it is that Pillow refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it warns at half of what it refuses
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large ({error}); scale it down") from error
    except UnidentifiedImageError as error:  # whose text holds an address in memory, another each time
        raise ValueError(
            f"{name} cannot be read as a picture (it is of no known format); save it again or take it out"
        ) from error
    except Exception as error:  # each format's decoder raises other kinds on broken files
        raise ValueError(f"{name} cannot be read as a picture ({error}); save it again or take it out") from error


def decode(content: bytes, name: str, background: str = "white", most_pixels: int = MOST_PIXELS) -> Image.Image:
    """A picture upright in RGB: EXIF rotation applied, transparency over `background`, of an animation the first frame.

    At its peak it holds 8 bytes a pixel, 13 with transparency, 20 in JPEG 2000: `most_pixels` bounds the memory.

    Raises:
        ValueError: it cannot be decoded, its pixels are 32-bit numbers, whose white is not known, or it has more than
            `most_pixels`, which its header tells before anything is decoded.
    """
    with _readable(name), Image.open(io.BytesIO(content)) as picture:
        pixels = picture.width * picture.height
        if pixels > most_pixels:
            raise Image.DecompressionBombError(f"{pixels} pixels, more than data.most_pixels={most_pixels}")
        return upright(picture, background)


def upright(picture: Image.Image, background: str = "white") -> Image.Image:
    """EXIF rotation applied (to `picture` itself, which saves a copy), transparency over `background`, RGB.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose white is not known.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its mode is {picture.mode}, 32 bits a pixel; 8 or 16 are read")
    if picture.mode.startswith("I;16"):  # convert would clip at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGB", layer.size, background)
        ground.paste(layer, mask=layer.getchannel("A"))
        return ground
    return picture.convert("RGB")


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
    digest.update(picture.tobytes())
    return digest.hexdigest()
