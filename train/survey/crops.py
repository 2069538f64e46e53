"""Crops exactly as the trainer will see them, with captions and notes: one card for each picture, as HTML.

Crops are small JPEG files within the page, cut by `train.data.buckets.cut` as the trainer's are. Whatever comes from
the user reaches the page as escaped text.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from itertools import zip_longest

import numpy as np
from PIL import Image

from infer.sample.picture import decode
from train.data.buckets import LATENT, cut, cut_mask, reference_view
from train.data.dataset import Data
from train.data.mask import decode_mask
from train.data.source import Sample
from train.data.view import View
from train.latents.workers import Room, work_ahead
from train.survey.survey import Survey

SIDE = 320  # pixels: longest side of an embedded crop
COVER = (225, 30, 70)  # the colour over what a mask leaves out
TEXTS = 4  # shown on a card

STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .75rem; }
.card { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  display: flex; flex-direction: column; gap: .5rem; min-width: 0; content-visibility: auto;
  contain-intrinsic-size: auto 22rem; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)); gap: .35rem; align-items: start; }
.view { margin: 0; } .view span { display: block; font-size: .75rem; color: var(--soft); margin-top: .15rem; }
.crop { position: relative; overflow: hidden; border-radius: .4rem; width: min(100%, 13rem * var(--ratio)); }
.crop img { display: block; width: 100%; height: auto; }
.crop img + img { position: absolute; inset: 0; height: 100%; image-rendering: pixelated; }
body:has(#masks:not(:checked)) .crop img + img { display: none; }
.name { font-size: .8rem; font-weight: 600; overflow-wrap: anywhere; }
.card ul { margin: 0; padding: 0; list-style: none; font-size: .85rem; display: grid; gap: .35rem; }
.card li { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9rem; overflow-y: auto; }
.card li + li { border-top: 1px solid var(--line); padding-top: .35rem; }
.card small { color: var(--soft); }
.notes { display: flex; flex-wrap: wrap; gap: .25rem; font-size: .75rem; margin-top: auto; color: var(--soft); }
.notes span { border: 1px solid var(--line); border-radius: 1rem; padding: .05rem .5rem; overflow-wrap: anywhere; }
"""


def cards(indices: Sequence[int], found: Survey, data: Data, workers: int, room: Room, most: int) -> Iterator[str]:
    """A card of markup for each index, in their order: up to `most` of its views, its texts and its notes."""

    def card(index: int) -> str:
        sample, picture = found.samples[index], found.pictures[index]
        assert picture is not None
        by_resolution = [
            [(view, side) for view in views] for side, views in zip(data.resolutions, picture.views, strict=True)
        ]
        views = [view for one_each in zip_longest(*by_resolution) for view in one_each if view is not None]
        with room(picture.width * picture.height):
            drawn = "".join(_views(sample, views[:most], data))
        texts = found.texts[index]
        items = "".join(f"<li>{escape(text)}{_tokens(found, text)}</li>" for text in texts[:TEXTS])
        if len(texts) > TEXTS:
            items += f"<li><small>and {len(texts) - TEXTS} more texts</small></li>"
        notes = "".join(f"<span>{escape(note)}</span>" for note in found.notes.get(index, ()))
        more = f"<p>and {len(views) - most} more views</p>" if len(views) > most > 1 else ""
        return (
            f'<figure class="card"><div class="views">{drawn}</div>{more}<div class="name">{escape(sample.name)} '
            f"<small>{picture.width} x {picture.height}</small></div><ul>{items}</ul>"
            + (f'<div class="notes">{notes}</div>' if notes else "")
            + "</figure>"
        )

    return work_ahead(card, indices, workers)


def _tokens(found: Survey, text: str) -> str:
    return "" if found.lengths is None else f" <small>{found.lengths[text]} tokens</small>"


def _views(sample: Sample, views: Sequence[tuple[View, int]], data: Data) -> Iterator[str]:
    """Each view with its mask, and before it the views of its references. views: with their resolutions."""
    picture = decode(sample.read(), sample.name, data.background, data.most_pixels)
    shown = [
        decode(each.read(), f"the reference {each.name}", data.background, data.most_pixels)
        for each in sample.references
    ]
    # several share the card's width
    side = SIDE if len(views) == 1 and not shown else SIDE // 2 + 32
    mask = None
    if sample.read_mask is not None:
        mask = decode_mask(sample.read_mask(), sample.name, picture.size, data.most_pixels)
    for view, resolution in views:
        for number, reference in enumerate(shown, start=1):
            own = reference_view(reference.size, picture.size, view, resolution, data)
            yield _figure(_crop(reference, own, side), own, f"reference{f' {number}' * (len(shown) > 1)}, ")
        images = _crop(picture, view, side)
        if mask is not None:
            cover = np.zeros((view.height // LATENT, view.width // LATENT, 4), np.uint8)
            cover[..., :3] = COVER
            cover[..., 3] = ((1 - cut_mask(mask, view).numpy()) * 150).round()
            images += f'<img alt="its mask" src="{_uri(Image.fromarray(cover), "PNG")}">'
        yield _figure(images, view, "")


def _crop(picture: Image.Image, view: View, side: int) -> str:
    """A view as an image whose longest side is `side` at most."""
    pixels = ((cut(picture, view).permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    crop = Image.fromarray(pixels)
    crop.thumbnail((side, side), Image.Resampling.LANCZOS)
    return f'<img alt="" loading="lazy" width="{crop.width}" height="{crop.height}" src="{_uri(crop, "JPEG")}">'


def _figure(images: str, view: View, what: str) -> str:
    size = f"{what}{view.width} x {view.height}{', mirrored' if view.flip else ''}"
    ratio = f"--ratio: {view.width / view.height:.4f}"
    return f'<figure class="view"><div class="crop" style="{ratio}">{images}</div><span>{size}</span></figure>'


def _uri(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 80} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
