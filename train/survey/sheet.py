"""The contact sheet: what a survey found, as one HTML page that opens offline.

Whatever comes from the user reaches the page as escaped text.
"""

from collections.abc import Iterable
from html import escape

import numpy as np

from infer.report.cells import text_cell
from infer.report.page import SCROLL, Cell, contents, document, facts_list, table
from train.data.dataset import Data, sources_of
from train.latents.workers import Room
from train.survey import crops
from train.survey.survey import Survey, reasons, sources

VIEWS = 4  # views of a picture that are shown

STYLE = """
.verdict { padding: .75rem 1rem; border-radius: .75rem; border: 1px solid var(--line); background: var(--card);
  color: var(--ink); margin: 0 0 1.25rem; font-size: 1rem; border-left: .35rem solid var(--mark);
  overflow-wrap: anywhere; }
:root { --good: light-dark(#2e7d46, #63c183); --bad: light-dark(#c0392b, #ff8f80); }
.good { --mark: var(--good); } .bad { --mark: var(--bad); }
.list { width: 100%; font-size: .9rem; }
.list :is(td, th) { padding: .45rem .75rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
.list tr:first-child > * { border-top: 0; }
.list th { font-weight: 500; width: 25%; min-width: 9rem; }
.list div { white-space: pre-wrap; max-height: 9rem; overflow-y: auto; }
.scroll { max-height: 36rem; overflow: auto; }
:is(#buckets, #all) thead th { position: sticky; top: 0; background: var(--card); z-index: 1; }
.all td[data-text] { white-space: normal; min-width: 9rem; max-width: 24rem; overflow-wrap: anywhere; }
.tools { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .75rem 0; font-size: .9rem; }
.tools input[type=search] { width: min(100%, 24rem); }
.tools label { display: flex; gap: .4rem; align-items: center; }
input[type=checkbox] { width: 1rem; height: 1rem; }
summary { cursor: pointer; padding: .4rem 0; font-size: .95rem; }
.groups, .group { display: flex; flex-wrap: wrap; gap: .75rem; }
.group { border: 1px dashed var(--line); border-radius: 1rem; padding: .5rem; }
.group .card { width: clamp(9rem, 40vw, 14rem); }
"""

SCRIPT = """
const search = document.querySelector("#search"), shown = document.querySelector("#found");
const flagged = document.querySelector("#flagged");
const items = [...document.querySelectorAll("#crops .card, .all tbody tr")];
const texts = items.map((item) => item.textContent.toLowerCase());
const marked = items.map((item) => item.matches(".card") ? item.querySelector(".notes") !== null
  : item.cells[item.cells.length - 1].textContent !== "");
const sift = () => {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let cards = 0, lines = 0;
  items.forEach((item, i) => {
    item.hidden = (flagged.checked && !marked[i]) || !words.every((word) => texts[i].includes(word));
    if (!item.hidden) item.matches(".card") ? cards++ : lines++;
  });
  shown.textContent = words.length || flagged.checked ? `${cards} crops and ${lines} lines of the table match` : "";
};
search.addEventListener("input", sift);
flagged.addEventListener("change", sift);
"""


def render(
    heading: str,
    facts: dict[str, str],
    refusal: str | None,
    found: Survey,
    data: Data,
    shown: int,
    workers: int,
    room: Room,
) -> str:
    """The whole page. refusal: why training could not start; shown: pictures whose crops are drawn."""
    verdict = '<p class="verdict good">Training can start on this data.</p>'
    if refusal is not None:
        verdict = f'<p class="verdict bad"><strong>Training cannot start:</strong> {escape(refusal)}</p>'
    sections = [
        ("Sources", _sources(found, data)),
        ("Buckets", _buckets(found)),
        ("Broken", _broken(found)),
        ("Duplicates", _duplicates(found, data, shown, workers, room)),
        ("Captions", _captions(found, data)),
        ("Crops", _crops(found, data, shown, workers, room)),
        ("All", _all(found)),
    ]
    links = contents([(name.lower(), name) for name, body in sections if body])
    parts = [verdict, facts_list(facts), links]
    titles = {"Broken": "Broken and left out", "All": "All pictures"}
    parts += [
        f'<section id="{name.lower()}"><h2>{titles.get(name, name)}</h2>{body}</section>'
        for name, body in sections
        if body
    ]
    return document(heading, parts, crops.STYLE + STYLE, SCRIPT)


def _sources(found: Survey, data: Data) -> str:
    given = sources_of(data)
    cells: list[list[Cell]] = []
    for index, count, masks in sources(found):
        source = given[index]
        kind = "prior" if source.prior else "training"
        repeats = _number(source.repeats)
        if (data.prior.path or data.prior.count) and index == len(given) - 1:
            repeats = (f"ratio {data.prior.ratio:g}", data.prior.ratio, None)
        weight = _number(source.weight)
        cells.append([text_cell(source.path), text_cell(kind), _number(count), _number(masks), repeats, weight])
    return table(["source", "for", "pictures", "masks", "repeats", "weight"], cells, [0, 1]) if cells else ""


def _buckets(found: Survey) -> str:
    buckets = found.buckets()
    most = max((len(fits) for fits in buckets.values()), default=1)
    cells: list[list[Cell]] = []
    for (resolution, width, height), fits in buckets.items():
        cuts, count = [fit.cut for fit in fits], len(fits)
        cells.append(
            [
                (f"{width} x {height}", f"{width} x {height}", None),
                (f"{count:,}", count, count / most),
                _number(resolution),
                _share(sum(cuts) / count),
                _share(max(cuts)),
                _number(sum(fit.smaller for fit in fits)),
                _number(sum(fit.scale > 1 for fit in fits)),
            ]
        )
    titles = ["bucket", "pictures", "resolution", "cut, mean", "cut, most", "smaller than asked", "enlarged"]
    return table(titles, cells, [0]) if cells else ""


def _broken(found: Survey) -> str:
    if not found.skipped:
        return ""
    kinds = ", ".join(f"{count} {reason}" for reason, count in reasons(found).items())
    return f"<p>{escape(kinds)}</p>" + _list((skipped.name, skipped.reason) for skipped in found.skipped)


def _duplicates(found: Survey, data: Data, shown: int, workers: int, room: Room) -> str:
    parts = []
    for title, groups in (("Same pixels", found.copies), ("Nearly the same", found.near.groups)):
        if not groups:
            continue
        count = sum(map(len, groups))
        drawn = [group[:VIEWS] for group in groups[: max(1, shown // VIEWS)]]
        parts.append(f"<h3>{title}: {len(groups)} groups of {count} pictures, {len(drawn)} shown</h3>")
        drawn_cards = iter(crops.cards([index for group in drawn for index in group], found, data, workers, room, 1))
        parts.append('<div class="groups">')
        for group, whole in zip(drawn, groups, strict=False):
            rest = ", ".join(found.samples[index].name for index in whole[len(group) :])
            parts.append(f'<div class="group">{"".join(next(drawn_cards) for _ in group)}')
            parts.append(f"<p>and {escape(rest)}</p></div>" if rest else "</div>")
        parts.append("</div>")
        if len(groups) > len(drawn):
            names = (
                (found.samples[first].name, ", ".join(found.samples[index].name for index in others))
                for first, *others in groups[len(drawn) :]
            )
            parts.append(_list(names))
    if found.near.looked_at < found.near.candidates:
        parts.append(
            f"<p>{found.near.looked_at:,} of {found.near.candidates:,} pairs that are alike were compared.</p>"
        )
    return "".join(parts)


def _captions(found: Survey, data: Data) -> str:
    parts = []
    if found.lengths is None:
        parts.append("<p>text tokens were not counted: the model's tokenizer is not here.</p>")
    elif found.lengths:
        counts = np.array(list(found.lengths.values()))
        assert found.length is not None
        edges = np.unique(np.linspace(0, found.length, 9).round().astype(int))
        bins = [*np.diff(np.searchsorted(np.sort(counts), edges, side="right")), len(found.truncated)]
        labels = [*(f"up to {edge}" for edge in edges[1:]), f"more than {found.length}, truncated"]
        cells: list[list[Cell]] = [
            [text_cell(label), (f"{n:,}", int(n), n / max(1, *bins))] for label, n in zip(labels, bins, strict=True)
        ]
        parts.append(
            f"<p>{len(counts):,} texts of {counts.min()} to {counts.max()} text tokens (median {np.median(counts):g}); "
            f"the text encoder sees {found.length}.</p>{table(['text tokens', 'texts'], cells, [0])}"
        )
    if found.truncated:
        assert found.lengths is not None
        lines = ((f"{found.lengths[text]} tokens", text) for text in found.truncated)
        parts.append(f"<h3>Truncated: {len(found.truncated)} texts</h3>{_list(lines)}")
    if found.untriggered:
        pairs = ((found.samples[index].name, "\n".join(found.samples[index].captions)) for index in found.untriggered)
        title = (
            f"Without the trigger “{escape(data.trigger or '')}”, which is put before them: {len(found.untriggered)}"
        )
        parts.append(f"<h3>{title}</h3>{_list(pairs)}")
    if found.shared:
        groups = ((_shared(found, g), ", ".join(found.samples[index].name for index in g)) for g in found.shared)
        parts.append(f"<h3>Captions of several pictures: {len(found.shared)}</h3>{_list(groups)}")
    return "".join(parts)


def _shared(found: Survey, group: list[int]) -> str:
    common = set.intersection(*(set(found.samples[index].captions) for index in group))
    return "\n".join(sorted(common))


def _crops(found: Survey, data: Data, shown: int, workers: int, room: Room) -> str:
    usable = found.usable
    count = min(shown, len(usable))
    chosen = [usable[i * len(usable) // count] for i in range(count)]
    views = "each at every resolution, crop and flip" if len(data.resolutions) * data.crops > 1 or data.flip else ""
    return (
        f"<p>{count:,} of {len(usable):,} pictures, evenly spread, as the trainer sees them"
        f"{', ' + views if views else ''}.</p>"
        '<div class="tools"><label><span>Search</span><input type="search" id="search" '
        'placeholder="names, captions, notes"></label>'
        '<label><input type="checkbox" id="flagged">only with notes</label>'
        '<label><input type="checkbox" id="masks" checked>masks, red where nothing is learned</label>'
        '<span id="found" role="status"></span></div>'
        f'<div class="sheet">{"".join(crops.cards(chosen, found, data, workers, room, VIEWS))}</div>'
    )


def _all(found: Survey) -> str:
    cells: list[list[Cell]] = []
    for index in found.usable:
        picture, sample, fits = found.pictures[index], found.samples[index], found.fits[index]
        assert picture is not None
        buckets = ", ".join(f"{fit.width} x {fit.height}" for fit in fits)
        tokens = None if found.lengths is None else max(found.lengths[text] for text in found.texts[index])
        cells.append(
            [
                text_cell(sample.name),
                text_cell("\n".join(sample.captions)),
                (f"{picture.width} x {picture.height}", picture.width * picture.height, None),
                (buckets, fits[0].width * fits[0].height, None),
                _share(max(fit.cut for fit in fits)),
                (f"{fits[0].scale:.2f}", fits[0].scale, None),
                ("" if tokens is None else f"{tokens}", tokens, None),
                text_cell(", ".join(found.notes.get(index, ()))),
            ]
        )
    if not cells:
        return ""
    titles = ["name", "captions", "size", "bucket", "cut", "scale", "text tokens", "notes"]
    body = table(titles, cells, [0, 1, 7]).replace('class="summary"', 'class="summary all"', 1)
    return f"<details{' open' if len(cells) <= 200 else ''}><summary>{len(cells):,} pictures</summary>{body}</details>"


def _list(pairs: Iterable[tuple[str, str]]) -> str:
    """Two columns of text in a box that scrolls."""
    lines = (f'<tr><th scope="row">{escape(name)}</th><td><div>{escape(text)}</div></td></tr>' for name, text in pairs)
    return f'{SCROLL}<table class="list">{"".join(lines)}</table></div>'


def _number(value: float) -> Cell:
    return f"{value:,g}", value, None


def _share(value: float) -> Cell:
    return f"{100 * value:.1f} %", value, None
