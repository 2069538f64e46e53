"""The pictures of a comparison's rows, put together by prompt and seed."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from infer.report.cells import number, size, variant_text
from infer.report.gallery import GIVEN, Grid, Group, Picture
from infer.report.means import by_memory, memory
from infer.report.results import Row


def groups_of(rows: Sequence[Row], folder: Path) -> list[Group]:
    """For each prompt its seeds, and for each of these the pictures, precisions ordered by memory."""
    # Rows that agree in all four hold the same picture (a prompt listed twice, say): one of them is shown.
    pictures = {(row.asked, row.seed, row.adapter, row.precision): _picture(row, folder) for row in rows}
    adapters, names = list(dict.fromkeys(row.adapter for row in rows)), by_memory(rows)
    groups: dict[str, dict[int, Grid]] = {}
    for row in rows:
        groups.setdefault(row.asked, {})[row.seed] = [
            *_references(row, folder, len(names)),
            *(
                (variant_text(adapter), [pictures.get((row.asked, row.seed, adapter, name)) for name in names])
                for adapter in adapters
            ),
        ]
    return [(prompt, list(seeds.items())) for prompt, seeds in groups.items()]


def _references(row: Row, folder: Path, columns: int) -> Grid:
    """The reference pictures of a row's prompt, as lines of its grid."""
    count = len(row.references or ())
    shown: list[Picture | None] = [
        Picture(folder / name, quote(name), f"reference {i}", f"reference {i}", "reference", GIVEN, "", False)
        for i, name in enumerate(row.references or (), start=1)
    ]
    shown += [None] * (-count % columns)
    return [("reference" + "s" * (count > 1), shown[i : i + columns]) for i in range(0, len(shown), columns)]


def _picture(row: Row, folder: Path) -> Picture:
    scores = [f"{name} {number(score)}" for name, score in row.scores.items() if score is not None]
    scores += [f"nearest training picture {row.nearest}"] if row.nearest else []
    return Picture(
        file=folder / row.image,
        link=quote(row.image),
        name=f"{row.precision}, {variant_text(row.adapter)}",
        short=" + ".join(filter(None, (row.precision, row.adapter))),
        line=variant_text(row.adapter),
        caption=f"{size(memory(row))} · {number(row.seconds)} s",
        scores=", ".join(scores),
        reference=row.precision == "bf16",
    )
