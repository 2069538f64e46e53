"""The report as Markdown: the page's content for where HTML is not shown."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from infer.report import sections
from infer.report.cells import plain
from infer.report.gallery import Group
from infer.report.page import Cell


def line(texts: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(texts) + " |"


def escape(text: str) -> str:
    """Text as one line of Markdown that shows it as it is."""
    shown = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#~$!" else c for c in shown)


def plain_table(lines: Sequence[Sequence[str]]) -> str:
    """A table of titles (the first line) and cells that need no escape; all but the first two columns stand right."""
    rule = ["---", "---"] + ["---:"] * (len(lines[0]) - 2)
    return "".join(f"{line(cells)}\n" for cells in (lines[0], rule, *lines[1:]))


def markdown(
    heading: str,
    facts: dict[str, str],
    tables: Sequence[tuple[str, list[str], list[list[Cell]], tuple[int, ...]]],
    said: tuple[list[str], list[tuple[str, str]], str],
    columns: list[str],
    groups: list[Group],
    more: Sequence[dict[str, Any]],
) -> str:
    """The whole text.

    Args:
        tables: title, titles of columns, cells, and which columns hold text.
        said: sentences, scores with what they mean, and what was not measured.
        columns: the precisions, as the pictures stand.
        more: sections (infer/report/sections.py).
    """
    words, meanings, absent = said
    lines = [f"# {escape(heading)}", "", escape(" ".join(words))]
    for title, titles, cells, texts in tables:
        marks = ["---" if i in texts else "---:" for i in range(len(titles))]
        lines += ["", f"## {title}", "", line(map(escape, titles)), line(marks)]
        lines += [line(escape(plain(cell)) for cell in row) for row in cells]
    if meanings:
        lines += ["", *(f"- **{escape(name)}**: {escape(what)}" for name, what in meanings)]
    lines += ["", escape(absent)] if absent else []
    lines += ["", "![The first prompt at each precision, and the memory it takes](comparison.png)"]
    for section in more:
        lines += ["", f"## {escape(section['title'])}", ""]
        lines += [escape(section["note"]), ""] if section.get("note") else []
        lines += sections.to_markdown(section, lambda texts: line(map(escape, texts)))
    for number, (prompt, seeds) in enumerate(groups, start=1):
        # The quotation marks keep a prompt such as "- a" or "1. a" from becoming a list.
        lines += ["", f"## Prompt {number}", "", f"“{escape(prompt)}”"]
        for seed, grid in seeds:
            lines += ["", f"### Seed {escape(str(seed))}", "", line([" ", *map(escape, columns)])]
            lines.append(line(["---"] * (len(columns) + 1)))
            for variant, pictures in grid:
                shown = (p and f"![{escape(p.name)}]({p.link})<br>{p.caption}" for p in pictures)
                lines.append(line([escape(variant), *(cell or " " for cell in shown)]))
    lines += ["", "## About this comparison", "", *(f"- **{name}**: {escape(value)}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"
