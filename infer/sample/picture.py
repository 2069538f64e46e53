"""The bytes of a picture file -> an upright RGB picture: training pictures, and the references of a comparison."""

import hashlib
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

# files of these are read; of animated ones the first frame
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".avif",
    ".jp2",
    ".heic",
    ".heif",
)
# what may be in them: Pillow would read more, and hand some of it to other programs (PostScript)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
HEIC = (".heic", ".heif")  # Pillow reads them with the help of pillow-heif
BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"heim": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}
NO_HEIC = "is HEIC, which needs a package: pip install -e '.[heic]'; or save it as JPEG"
NO_AVIF = "is AVIF, which this build of Pillow does not read: pip install --upgrade pillow; or save it as JPEG"
MOST_PIXELS = 2 * 89_478_485  # what Pillow itself refuses to go beyond
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
KEPT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # what may say how the picture lies


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say which picture it is that Pillow refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it warns at half of what it refuses
            warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # such a picture lies as it is
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large ({error}); scale it down") from error
    except UnidentifiedImageError as error:  # whose text holds an address in memory, another each time
        raise ValueError(
            f"{name} cannot be read as a picture (it is of no format that is read); save it again or take it out"
        ) from error
    except Exception as error:  # each format's decoder raises other kinds on broken files
        raise ValueError(f"{name} cannot be read as a picture ({error}); save it again or take it out") from error


def decode(content: bytes, name: str, background: str = "white", most_pixels: int = MOST_PIXELS) -> Image.Image:
    """A picture upright in RGB: EXIF rotation applied, colours in sRGB, transparency over `background`, of an animation
    the first frame.

    At its peak it holds 8 bytes a pixel, 13 with transparency, 16 and 21 in WebP, 20 in JPEG 2000, and 4 to 8 more
    where a colour profile is applied: `most_pixels` bounds the memory.

    Raises:
        ValueError: it cannot be decoded, its pixels are 32-bit numbers, whose white is not known, or it has more than
            `most_pixels`, which its header tells before anything is decoded.
    """
    check_readable(content, name)
    with _readable(name), Image.open(io.BytesIO(without_texts(content)), formats=_formats()) as picture:
        pixels = picture.width * picture.height
        if pixels > most_pixels:
            raise Image.DecompressionBombError(f"{pixels} pixels, more than data.most_pixels={most_pixels}")
        return upright(picture, background)


@cache
def reads_heic() -> bool:
    """Whether pillow-heif is here; Pillow knows it from the first call on."""
    if find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _formats() -> tuple[str, ...]:
    return (*FORMATS, "HEIF") if reads_heic() else FORMATS


def check_readable(content: bytes, name: str) -> None:
    """See that the package is here that a file's format needs.

    Raises:
        ValueError: it is not; the message names it.
    """
    kind = BRANDS.get(content[8:12]) if content[4:8] == b"ftyp" else None
    if kind == "HEIC" and not reads_heic():
        raise ValueError(f"{name} {NO_HEIC}")
    if kind == "AVIF" and not features.check("avif"):
        raise ValueError(f"{name} {NO_AVIF}")


def without_texts(content: bytes) -> bytes:
    """A PNG file without its texts but those that may say how the picture lies; anything else as it is.

    Image generators store how a picture was made as a text of megabytes, which Pillow refuses.
    """
    if not content.startswith(PNG):
        return content
    parts, kept, position = [], 0, len(PNG)  # content[kept:position] is to be kept
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        after = position + 12 + length  # length, kind, data, checksum
        if kind in TEXTS and after <= len(content) and not content.startswith(KEPT, position + 8):
            parts.append(content[kept:position])
            kept = after
        position = after
    return b"".join([*parts, content[kept:]]) if parts else content


def upright(picture: Image.Image, background: str = "white") -> Image.Image:
    """EXIF rotation applied (to `picture` itself, which saves a copy), colours in sRGB, transparency over `background`,
    RGB.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose white is not known.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its mode is {picture.mode}, 32 bits a pixel; 8 or 16 are read")
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
    if not picture.has_transparency_data:
        return _in_srgb(picture, profile).convert("RGB")
    grey = picture.mode in ("LA", "La")
    layer = picture.convert("RGBA")
    alpha = layer.getchannel("A")
    if profile:
        layer = _in_srgb(layer.getchannel("R") if grey else layer.convert("RGB"), profile).convert("RGB")
    ground = Image.new("RGB", layer.size, background)
    ground.paste(layer, mask=alpha)
    return ground


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits -> of 8, which `convert` would clip at 255."""
    wide = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})
    greys = (wide >> 8).astype(np.uint8)
    if tags.get(262) == 0:  # TIFF's photometric interpretation: white is zero; Pillow sees to it at 8 bits alone
        greys = 255 - greys
    clear = picture.info.get("transparency")
    if clear is None:
        return Image.fromarray(greys)
    alpha = np.where(wide == clear, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([greys, alpha], -1))


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture without transparency, converted to sRGB from the colours of its ICC profile. Where that profile cannot
    be used the picture is returned unchanged, as other programs show it."""
    if not profile:
        return picture
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(embedded).lower():  # nearly all: nothing to do
            return picture
        if picture.mode not in ("L", "RGB", "CMYK"):
            picture = picture.convert("RGB")
        found = ImageCms.profileToProfile(
            picture,
            embedded,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return picture
    assert found is not None
    return found


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
        with Image.open(io.BytesIO(content), formats=_formats()) as picture:
            return picture.width * picture.height
    except Exception:  # each format's reader raises other kinds
        return 0
