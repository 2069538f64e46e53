"""The pictures of a comparison within its page: a grid a prompt and seed, and a viewer for any two of them.

Small pictures are embedded byte for byte. Larger ones, or too many, are embedded as WebP, all at one size so that the
page stays below what a browser opens quickly, and link the original that lies beside the page.
"""

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from infer.report.page import asset


@dataclass(frozen=True)
class Picture:
    """A picture of the grid, and what is said about it."""

    file: Path
    link: str
    """Its address, relative to the page."""
    name: str
    short: str
    """Its name in the viewer's lists."""
    line: str
    """The line of the grid that it stands in."""
    caption: str
    """What it cost."""
    scores: str
    reference: bool
    """Whether the viewer compares its neighbours with it."""


Grid = list[tuple[str, list[Picture | None]]]  # a line for each adapter: its name, and a picture for each column
Group = tuple[str, list[tuple[int, Grid]]]  # a prompt, its seeds, and a grid for each

GIVEN = "as it is given"
"""The caption of reference pictures, which no precision has drawn."""
SMALL = 512  # pixels: longest side of a picture that may be embedded byte for byte
SIDES = (1024, 768, 512, 384, 256, 128)  # pixels: longest sides of the others, of which the largest that fits is taken
BUDGET = 12 * 2**20  # bytes that all embedded pictures may have together, at any side but the last
SAMPLE = 8  # pictures that are tried at a side before all are
SHOWN = 256  # CSS pixels: about the longest side of a picture in the grid
WIDE = 5  # columns that stand at that size; more are shown at half of it


class Embedded(NamedTuple):
    """A picture as a page holds it."""

    uri: str
    width: int  # pixels of the original
    height: int
    whole: bool  # byte for byte


def embed(files: Iterable[Path], budget: int = BUDGET) -> dict[Path, Embedded]:
    """Every file as a data URI; all are thumbnails of one size if the files are too large or too many."""
    paths = list(dict.fromkeys(files))
    sizes = {}
    for path in paths:
        with Image.open(path) as image:
            sizes[path] = image.size
    if max(max(size) for size in sizes.values()) <= SMALL and sum(p.stat().st_size for p in paths) <= budget:
        return {path: Embedded(_uri(path.read_bytes()), *sizes[path], True) for path in paths}
    most = max(max(size) for size in sizes.values())
    fewer = [side for side in SIDES if side < most]
    sides = [*SIDES[: len(SIDES) - len(fewer)][-1:], *fewer]  # the first keeps their own size, if one does
    sample = paths[:: -(-len(paths) // SAMPLE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for side in sides:
            small = [len(data) for data in pool.map(_thumbnail, sample, repeat(side))]
            if side != sides[-1] and sum(small) * len(paths) > budget * len(sample):
                continue
            thumbnails = list(pool.map(_thumbnail, paths, repeat(side)))
            if sum(map(len, thumbnails)) <= budget:
                break
    return {path: Embedded(_uri(data), *sizes[path], False) for path, data in zip(paths, thumbnails, strict=True)}


def _thumbnail(path: Path, side: int) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "WEBP", quality=88, method=2)
    return buffer.getvalue()


def _uri(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        kind = image.get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def gallery(
    columns: list[str], groups: list[Group], embedded: dict[Path, Embedded], apart: Mapping[str, str] | None = None
) -> str:
    """The bar that chooses a prompt, and for each prompt its pictures.

    apart: prompts on which the adapter should change nothing, and what they are called.
    """
    linked = not all(picture.whole for picture in embedded.values())
    parts = [_bar([prompt for prompt, _ in groups])] if len(groups) > 1 else []
    half = " half" if len(columns) > WIDE else ""
    for number, (prompt, seeds) in enumerate(groups, start=1):
        parts.append(f'<section class="prompt" id="prompt-{number}" data-number="{number}">')
        about = f"Prompt {number}{f', seed {seeds[0][0]}' if len(seeds) == 1 else ''}"
        about += f" (one of the {apart[prompt]}, where nothing should change)" if apart and prompt in apart else ""
        parts.append(f'<h3>{escape(about)}</h3><p class="text" dir="auto">{escape(prompt)}</p>')
        for seed, grid in seeds:
            parts.append(f"<h3>Seed {escape(str(seed))}</h3>" if len(seeds) > 1 else "")
            parts.append('<div class="scroll" tabindex="0" role="region" ')
            parts += [f'aria-label="Pictures of prompt {number}, seed {escape(str(seed))}"><table class="grid{half}">']
            parts += ["<thead><tr>", *(f'<th scope="col">{escape(column)}</th>' for column in columns), "</tr></thead>"]
            for name, pictures in grid:
                parts.append(f'<tbody><tr><th scope="rowgroup" colspan="{len(columns)}">{escape(name)}</th></tr><tr>')
                parts += [f"<td>{_picture(p, seed, embedded) if p else ''}</td>" for p in pictures]
                parts.append("</tr></tbody>")
            parts.append("</table></div>")
        parts.append("</section>")
    hint = "Click on a picture to compare it with any other."
    if linked:
        hint += " The pictures in this page are reduced; the originals lie beside it."
    return f"<p>{hint}</p>" + "".join(parts)


def _bar(prompts: Sequence[str]) -> str:
    options = [
        f'<option value="{number}" dir="auto">{number} · {escape(_short(prompt))}</option>'
        for number, prompt in enumerate(prompts, start=1)
    ]
    return (
        '<div class="bar scripted" hidden role="group" aria-label="Prompt">'
        '<button class="button" id="previous" aria-label="Previous prompt">‹</button>'
        f'<select id="prompt" aria-label="Prompt">{"".join(options)}<option value="all">All prompts</option></select>'
        '<button class="button" id="next" aria-label="Next prompt">›</button>'
        f'<span id="position" role="status"></span></div>'
    )


def _short(text: str, most: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _picture(picture: Picture, seed: int, embedded: dict[Path, Embedded]) -> str:
    """A picture as a button that opens the viewer, with its caption."""
    data = embedded[picture.file]
    side, link = max(data.width, data.height), ""
    if not data.whole:
        link = f' · <a href="{escape(picture.link)}">{data.width} x {data.height}</a>'
    # Enlarged by a whole number only, pixel for pixel: smoothing would hide what the precisions differ in.
    scale = max(1, round(SHOWN / side)) if side <= SHOWN else SHOWN / side
    width, height = round(data.width * scale), round(data.height * scale)
    pixels = ' class="pixels"' if side <= SHOWN else ""
    facts: dict[str, object] = {
        "name": picture.name,
        "short": picture.short,
        "line": picture.line,
        "scores": picture.scores,
        "caption": picture.caption,
        "seed": seed,
        "width": data.width,
        "height": data.height,
        "link": "" if data.whole else picture.link,
    }
    known = " ".join(f'data-{name}="{escape(str(fact))}"' for name, fact in facts.items())
    reference = " data-reference" if picture.reference else ""
    return (
        f'<button class="picture" {known}{reference}><img{pixels} alt="{escape(picture.name)}" width="{width}" '
        f'height="{height}" style="--w: {width}px" loading="lazy" decoding="async" src="{data.uri}"></button>'
        f"<span>{escape(picture.caption)}{link}</span>"
    )


def viewer() -> str:
    """The dialog that shows two pictures: slider, side by side, difference; zoom and pan move both."""
    return asset("viewer.html")
