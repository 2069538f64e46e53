"""The bytes of a mask file -> a mask of its picture's size; pictures are decoded in infer/sample/picture.py."""

from PIL import Image

from infer.sample.picture import MOST_PIXELS, decode


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
