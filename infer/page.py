"""A comparison's page: one HTML file that opens offline, with every picture, style and script inside it.

Pictures up to 512 pixels are embedded byte for byte, larger ones as a thumbnail that links the original. A click on a
picture compares it with another of the same prompt and seed. Data reaches the page as escaped HTML only: the script
holds none and writes text, never markup; the content policy forbids whatever would be fetched.

    python -m infer.report runs/compare    # writes it again, with the rest of the report
"""

import base64
import io
from collections.abc import Collection
from html import escape
from typing import Any

from PIL import Image

Cell = tuple[str, str | float | None, float | None]  # text, value to sort by, length of the bar behind it (0 to 1)
THUMBNAIL = 512  # pixels: longest side of an embedded picture
SHOWN = 256  # CSS pixels: about the longest side of a picture in the grid

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5c6670; --line: #dfe3e8;
  --accent: #2459c4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121417; --card: #1b1e23; --ink: #e8eaed; --soft: #a0a8b1; --line: #31363d; --accent: #8ab4ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .5rem; color: var(--soft); font-weight: 600; }
p { color: var(--soft); margin: .5rem 0; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .75rem; }
table { border-collapse: collapse; }
.summary { width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.summary td { padding: .6rem .75rem; border-top: 1px solid var(--line); text-align: right; }
.summary th { padding: 0; text-align: right; }
.summary [data-text] { text-align: left; } .summary td:first-child { font-weight: 600; }
.summary td[style] { background: linear-gradient(var(--accent) 0 0) no-repeat left bottom -4px / var(--share) 3px;
  background-origin: content-box; }
.summary th button { all: unset; cursor: pointer; padding: .6rem .75rem; color: var(--soft); font-weight: 600; }
.summary th button::after { content: " \\2195"; opacity: .35; }
.summary th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
.summary th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll:focus-visible, .summary th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
a { color: var(--accent); }
.grid { margin: .5rem; }
.grid th { padding: .35rem .5rem; font-size: .9rem; text-align: left; }
.grid th[scope=row] { color: var(--soft); font-weight: 500; vertical-align: top; min-width: 5.5rem; }
.grid td { padding: .25rem .5rem .75rem; vertical-align: top; font-size: .8rem; color: var(--soft); }
.picture { display: block; padding: 0; margin-bottom: .35rem; border: 0; border-radius: .4rem; background: none;
  cursor: zoom-in; }
.picture img { display: block; height: auto; border-radius: .4rem; }
.pixels { image-rendering: pixelated; }
dialog { width: fit-content; max-width: 96vw; border: 1px solid var(--line); border-radius: .9rem; padding: 1.1rem;
  background: var(--card); color: var(--ink); }
dialog::backdrop { background: #000a; }
dialog header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; justify-content: space-between;
  margin-bottom: .75rem; }
dialog :is(select, header button) { font: inherit; color: inherit; background: var(--page); padding: .25rem .6rem;
  border: 1px solid var(--line); border-radius: .4rem; max-width: 100%; }
.prompt { color: inherit; font-size: 1rem; max-width: 70ch; overflow-wrap: anywhere; white-space: pre-wrap; }
.scores { width: 0; min-width: 100%; display: flex; justify-content: space-between; gap: 1rem; }
#right { text-align: right; }
dialog input { width: 100%; margin: .75rem 0 0; accent-color: var(--accent); border-radius: 1rem; }
.stage { position: relative; width: min(86vw, 66vh * var(--ratio, 1), 768px); margin: 0 auto; cursor: ew-resize;
  aspect-ratio: var(--ratio, 1); overflow: hidden; border-radius: .4rem; touch-action: none; user-select: none; }
.stage img { position: absolute; width: 100%; height: 100%; }
.stage img + img { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.stage::after { content: ""; position: absolute; inset: 0 auto 0 calc(var(--at) - 1px); width: 2px; background: #fff;
  box-shadow: 0 0 3px #000; }
"""

SORT = """
"use strict";
const value = (row, i) => row.cells[i].dataset.value;
for (const button of document.querySelectorAll(".summary th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, i = head.cellIndex, body = head.closest("table").tBodies[0];
    const sign = head.ariaSort === "ascending" ? -1 : 1, words = "text" in head.dataset;
    for (const other of head.parentElement.cells) other.ariaSort = "none";
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const compare = (a, b) => {
      const x = value(a, i), y = value(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not defined stays last
      return sign * (words ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
"""

SCRIPT = """
const dialog = document.querySelector("dialog"), stage = dialog.querySelector(".stage");
const [lower, upper] = stage.querySelectorAll("img");
const range = dialog.querySelector("input"), select = dialog.querySelector("select");
let others = [];
const slide = () => stage.style.setProperty("--at", range.value + "%");
const show = (image, button) => {
  const source = button.firstElementChild;
  image.src = source.src; image.alt = source.alt; image.className = source.className;
};
const choose = () => {
  show(lower, others[select.value]);
  dialog.querySelector("#right").textContent = others[select.value].dataset.scores;
};
for (const button of document.querySelectorAll(".picture")) {
  button.addEventListener("click", () => {
    const all = [...button.closest("table").querySelectorAll(".picture")];
    others = all.length > 1 ? all.filter((other) => other !== button) : all;
    const reference = others.filter((other) => "reference" in other.dataset);
    const first = reference.find((other) => other.dataset.line === button.dataset.line) ?? reference[0] ?? others[0];
    select.replaceChildren(...others.map((other, i) => new Option(other.dataset.name, i)));
    select.value = others.indexOf(first);
    dialog.querySelector("strong").textContent = button.dataset.name;
    dialog.querySelector("#left").textContent = button.dataset.scores;
    const {naturalWidth, naturalHeight} = button.firstElementChild;
    stage.style.setProperty("--ratio", naturalWidth / naturalHeight);
    show(upper, button); choose();
    range.value = 50; slide();
    dialog.showModal();
    range.focus();
  });
}
range.addEventListener("input", slide);
select.addEventListener("change", choose);
for (const event of ["pointerdown", "pointermove"]) {
  stage.addEventListener(event, (pointer) => {
    if (!pointer.buttons) return;
    const box = stage.getBoundingClientRect();
    range.value = 100 * (pointer.clientX - box.left) / box.width;
    slide();
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });  // beside it
"""

HINT = "Click on a title to sort by it, and on a picture to compare it with another."
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'  # the keyboard scrolls what has focus
DIALOG = """
<dialog aria-label="Comparison of two pictures">
<header><strong></strong><label>against <select></select></label><button>Close</button></header>
<div class="stage"><img alt=""><img alt=""></div>
<input type="range" min="0" max="100" step="0.5" aria-label="Share of the first picture, in per cent">
<div class="scores"><p id="left"></p><p id="right"></p></div>
</dialog>
"""


def render(
    heading: str,
    facts: dict[str, str],
    titles: list[str],
    cells: list[list[Cell]],
    columns: list[str],
    groups: list[tuple[str, list[tuple[int, list[tuple[str, list[dict[str, Any] | None]]]]]]],
) -> str:
    """The whole page.

    Args:
        heading: the page's title.
        facts: what the comparison ran on, by name.
        titles: of the summary's columns; the first two hold text, the rest numbers.
        cells: lines of the summary.
        columns: names of the precisions, from left to right.
        groups: for each prompt its seeds; for each seed, adapter and column a picture (see `infer.report`) or None.
    """
    parts = [f"<h1>{escape(heading)}</h1>", facts_list(facts), "<h2>Summary</h2>", table(titles, cells, (0, 1))]
    parts += ["<p>Times and scores are means over the pictures.", HINT, "</p>"]
    for number, (prompt, seeds) in enumerate(groups, start=1):
        parts.append(f'<h2>Prompt {number}</h2><p class="prompt">{escape(prompt)}</p>')
        for seed, grid in seeds:
            parts += [f"<h3>Seed {escape(str(seed))}</h3>", SCROLL, '<table class="grid"><thead><tr><td></td>']
            parts += [f'<th scope="col">{escape(column)}</th>' for column in columns]
            parts.append("</tr></thead><tbody>")
            for name, pictures in grid:
                parts.append(f'<tr><th scope="row">{escape(name)}</th>')
                parts += [f"<td>{_picture(picture, name) if picture else ''}</td>" for picture in pictures]
                parts.append("</tr>")
            parts.append("</tbody></table></div>")
    return document(heading, parts, STYLE, SORT + SCRIPT, DIALOG)


def document(heading: str, parts: list[str], style: str, script: str, after: str = "") -> str:
    """A whole page that opens offline; `parts` and `after` are markup, `heading` is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}</title>\n<style>{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + f"\n</main>\n{after}\n<script>{script}</script></body></html>\n"
    )


def facts_list(facts: dict[str, str]) -> str:
    """Names and values."""
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def table(titles: list[str], cells: list[list[Cell]], texts: Collection[int]) -> str:
    """A table that sorts by a click on its titles; the columns `texts` hold text, the rest numbers."""
    marks = [" data-text" if i in texts else "" for i in range(len(titles))]
    parts = [SCROLL, '<table class="summary"><thead><tr>']
    parts += [
        f'<th scope="col" aria-sort="none"{mark}><button>{escape(title)}</button></th>'
        for title, mark in zip(titles, marks, strict=True)
    ]
    parts.append("</tr></thead><tbody>")
    parts += [f"<tr>{''.join(map(_cell, line, marks))}</tr>" for line in cells]
    return "".join([*parts, "</tbody></table></div>"])


def _cell(cell: Cell, mark: str) -> str:
    text, value, share = cell
    bar = "" if share is None else f' style="--share: {share:.1%}"'
    return f'<td{mark} data-value="{"" if value is None else escape(str(value))}"{bar}>{escape(text)}</td>'


def _picture(picture: dict[str, Any], line: str) -> str:
    """A picture as a button that opens the comparison, with its caption."""
    data = picture["file"].read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        kind, link = image.get_format_mimetype(), ""
        if max(width, height) > THUMBNAIL:
            link = f' · <a href="{escape(picture["link"])}">{width} x {height}</a>'
            small, buffer = image.convert("RGB"), io.BytesIO()
            small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            small.save(buffer, "WEBP", quality=90)
            data, kind = buffer.getvalue(), "image/webp"
    side = max(width, height)
    # Enlarged by a whole number only, pixel for pixel: smoothing would hide what the precisions differ in.
    scale, style = (max(1, round(SHOWN / side)), ' class="pixels"') if side <= SHOWN else (SHOWN / side, "")
    name, scores = escape(picture["name"]), escape(picture["scores"])
    reference = " data-reference" if picture["reference"] else ""
    return (
        f'<button class="picture" data-name="{name}" data-line="{escape(line)}" data-scores="{scores}"{reference}>'
        f'<img{style} alt="{name}" width="{round(width * scale)}" height="{round(height * scale)}" '
        f'src="data:{kind};base64,{base64.b64encode(data).decode()}"></button>{escape(picture["caption"])}{link}'
    )
