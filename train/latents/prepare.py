"""One sample, read as far as it has to be: its picture, references and mask, decoded and cut to the views that are not
in the cache yet."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from infer.program.remembered import Remembered
from infer.sample.picture import decode, pixel_hash, pixels_of
from train.data.buckets import cut, cut_mask
from train.data.mask import decode_mask
from train.data.source import Reference, Sample, Skipped
from train.data.view import View
from train.latents.identities import Picture, Shown, digest, digest_file
from train.latents.settings import Encode
from train.latents.store import Cache
from train.latents.workers import make_room
from train.latents.writer import ShardWriter

MASK = "its mask"  # as messages name it, after the sample's name
Tensors = list[tuple[str, Tensor]]
"""Key and pixels of each view."""


class Prepared(NamedTuple):
    """A sample, read as far as it has to be."""

    sample: int
    found: Picture | Skipped
    known: dict[bytes, Picture]
    """What was learned of the bytes that were decoded."""
    pictures: Tensors
    """Absent views, [3, height, width] in [-1, 1]."""
    masks: Tensors
    """Absent views of the mask, [height / 8, width / 8] in [0, 1]."""
    complete: bool
    """Whether no other process or thread is making a view of this sample."""


def make_preparer(
    cache: Cache,
    samples: list[Sample],
    writers: dict[str, ShardWriter],
    remembered: Remembered,
    identity: Callable[[bytes], Picture | None],
    encode: Encode,
    dtype: torch.dtype,
) -> Callable[[int], Prepared]:
    """A function, for threads, that reads a sample, and decodes and cuts its picture and its mask where it has to.

    identity: what some bytes decode to, by their digest, where that is known. dtype: of the pictures' pixels.
    """
    data, room = cache.data, make_room(encode.decode_pixels)

    def prepare(i: int) -> Prepared:
        sample, known, complete = samples[i], dict[bytes, Picture](), True
        claimed: list[tuple[ShardWriter, set[str]]] = []

        def claim(kind: str, views: dict[str, View]) -> dict[str, View]:
            nonlocal complete
            mine, rest = writers[kind].claim(views.keys())
            claimed.append((writers[kind], mine))
            complete = complete and rest
            return {key: view for key, view in views.items() if key in mine}

        def load(
            kind: str,
            given: tuple[bytes, bytes | None],
            read: Callable[[], bytes],
            settings: tuple[object, ...],
            open_picture: Callable[[bytes], Image.Image],
            crop: Callable[[Image.Image, View], Tensor],
            part_of: Callable[[Picture], Picture],
            keys_of: Callable[[Picture], dict[str, View]],
            least: int = 0,
        ) -> tuple[Picture, Tensors]:
            """What the sample's picture is with this part of it, and the part's absent views.

            Args:
                given: digest and bytes.
                part_of: what is found -> the sample's picture with it.
                keys_of: the sample's picture -> the part's views by their keys.
                least: pixels that are decoded, whatever its header says.
            """
            key, content = given
            found = identity(key)
            if kind == "pictures" and found is not None and found.width * found.height > data.most_pixels:
                found = None  # decoding says that it is too large
            views, picture = dict[str, View](), None
            if found is not None:
                picture = part_of(found)
                views = claim(kind, keys_of(picture))
                if not views:
                    return picture, []
            if content is None:
                content = read()
                if digest(content, *settings) != key:
                    raise ValueError("changed while it was being read; start again")
            size = least if found is None else max(least, found.width * found.height)
            with room(max(pixels_of(content), size)):
                opened = open_picture(content)
                if found is None:
                    known[key] = Picture(pixel_hash(opened), *opened.size)
                    picture = part_of(known[key])
                    views = claim(kind, keys_of(picture))
                assert picture is not None
                return picture, [(key, crop(opened, view)) for key, view in views.items()]

        def load_reference(picture: Picture, number: int, reference: Reference) -> tuple[Picture, Tensors]:
            settings = "picture", data.background
            name = f"has the reference {reference.name}, which"

            def keys_of(picture: Picture) -> dict[str, View]:
                try:
                    return cache.reference_keys(picture, number)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from error

            return load(
                "pictures",
                digest_file(reference.file, reference.read, remembered, *settings),
                reference.read,
                settings,
                lambda content: decode(content, name, data.background, data.most_pixels),
                lambda opened, view: cut(opened, view).to(dtype),
                lambda found: picture._replace(references=(*picture.references, Shown(*found[:3]))),
                keys_of,
            )

        try:
            settings: tuple[object, ...] = "picture", data.background
            given = digest_file(sample.file, sample.read, remembered, *settings)
            picture, pictures = load(
                "pictures",
                given,
                sample.read,
                settings,
                lambda content: decode(content, sample.name, data.background, data.most_pixels),
                lambda opened, view: cut(opened, view).to(dtype),
                lambda found: found,
                lambda picture: cache.keys_of("pictures", picture),
            )
            for number, reference in enumerate(sample.references):
                picture, shown = load_reference(picture, number, reference)
                pictures += shown
            masks: Tensors = []
            if sample.read_mask is not None:
                settings, size = ("mask", given[0]), (picture.width, picture.height)
                picture, masks = load(
                    "masks",
                    digest_file(sample.mask_file, sample.read_mask, remembered, *settings),
                    sample.read_mask,
                    settings,
                    lambda content: decode_mask(content, MASK, size, data.most_pixels),
                    cut_mask,
                    partial(_masked, picture),
                    lambda picture: cache.keys_of("masks", picture),
                    picture.width * picture.height,
                )
        except (ValueError, OSError) as error:
            for writer, keys in claimed:
                writer.give_up(keys)
            reason = str(error).removeprefix(sample.name).strip()
            return Prepared(i, Skipped(sample.name, reason), known, [], [], True)
        return Prepared(i, picture, known, pictures, masks, complete)

    return prepare


def _masked(picture: Picture, mask: Picture) -> Picture:
    return picture._replace(mask=mask.identity)
