"""An HTML page in one file that opens offline: its frame, colours, theme switch and tables that sort.

What reaches a page is escaped text or markup made here; its content policy forbids whatever would be fetched. Styles
and scripts are the files in assets/, put into the page as they are.
"""

from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path

Cell = (  # text, value to sort by, length of the bar behind it (0 to 1), and perhaps a note below it
    tuple[str, str | float | None, float | None] | tuple[str, str | float | None, float | None, str]
)
POLICY = "default-src 'none'; img-src data:{images}; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'  # the keyboard scrolls what has focus
THEME = (
    '<label class="scripted" hidden>Theme <select id="theme"><option value="system">System</option>'
    '<option value="light">Light</option><option value="dark">Dark</option></select></label>'
)


def asset(name: str) -> str:
    """A file of assets/ as text."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def document(
    heading: str, parts: Sequence[str], style: str = "", script: str = "", after: str = "", images: str = ""
) -> str:
    """A whole page.

    Args:
        heading: text of its title and first line.
        parts: markup, in order.
        style, script: what comes after those that all pages share.
        after: markup behind the main part, such as dialogs.
        images: sources from which the policy lets pictures come beside those embedded, as ` file:`.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(images=images)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}</title>\n<style>{asset('page.css')}{style}</style></head>\n<body><main>\n"
        f'<div class="top"><h1>{escape(heading)}</h1>{THEME}</div>\n'
        + "\n".join(parts)
        + f"\n</main>\n{after}\n<script>{asset('page.js')}{script}</script></body></html>\n"
    )


def facts_list(facts: dict[str, str]) -> str:
    """Names and values."""
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def contents(sections: Sequence[tuple[str, str]]) -> str:
    """Links to sections: their ids and titles."""
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in sections)
    return f'<nav aria-label="Sections">{links}</nav>'


def table(
    titles: Sequence[str],
    cells: Sequence[Sequence[Cell]],
    texts: Collection[int],
    links: Sequence[str] = (),
) -> str:
    """A table that sorts by a click on its titles; the columns `texts` hold text, the rest numbers.

    Args:
        links: for each line where its first cell leads, or nothing.
    """
    marks = [' data-text dir="auto"' if i in texts else "" for i in range(len(titles))]
    parts = [SCROLL, '<table class="summary"><thead><tr>']
    parts += [
        f'<th scope="col" aria-sort="none"{" data-text" if mark else ""}><button>{escape(title)}</button></th>'
        for title, mark in zip(titles, marks, strict=True)
    ]
    parts.append("</tr></thead><tbody>")
    for i, line in enumerate(cells):
        hrefs = [links[i] if links else "", *[""] * (len(line) - 1)]
        parts.append(f"<tr>{''.join(map(_cell, line, marks, hrefs))}</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def _cell(cell: Cell, mark: str, href: str) -> str:
    text, value, share, *notes = cell
    bar = "" if share is None else f' style="--share: {share:.1%}"'
    shown = f'<a href="{escape(href)}">{escape(text)}</a>' if href else escape(text)
    shown += "".join(f"<small>{escape(note)}</small>" for note in notes if note)
    return f'<td{mark} data-value="{"" if value is None else escape(str(value))}"{bar}>{shown}</td>'
