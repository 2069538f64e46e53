"""The report of a small comparison: numbers against hand-made ones, files against what independent parsers read."""

import base64
import errno
import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from infer.report import cells, gallery, plot, sections, svg
from infer.report import write as report
from infer.report.means import by_memory, summarise, summary_of
from infer.report.results import (
    Comparison,
    Estimate,
    References,
    Row,
    Stage,
    Summary,
    from_json,
    read_results,
    results_text,
)
from infer.report.terminal import print_comparison
from infer.report.words import arrow, in_words, meaning, unmeasured
from infer.score.judges import GIVES

HOSTILE = "a $x_1$ | \"b\" 'c'\n<script>alert(1)</script> </style> [l](http://x.y) & `d` \\"
MIB, GIB = 2**20, 2**30
COLOURS = {  # precision, adapter -> the colour of its pictures
    ("nf4", None): (250, 10, 20),
    ("nf4", "neon & co"): (20, 250, 10),
    ("bf16", None): (10, 20, 250),
    ("bf16", "neon & co"): (250, 240, 30),
}


def differences_of(summary: list[Summary]) -> str:
    titles, lines = cells.difference_cells(summary)
    return cells.text_table([titles, *(list(map(cells.plain, line)) for line in lines)], 3) if lines else ""


def table_of(summary: list[Summary]) -> str:
    """Costs and scores with their limits, as a table of text."""
    titles, lines = cells.summary_cells(summary, "peak memory")
    return cells.text_table([titles, *(list(map(cells.plain, line)) for line in lines)])


def comparison(folder: Path, side: int = 128, prompts: tuple[str, ...] = (HOSTILE, "a fox")) -> Comparison:
    """nf4 before bf16, so that order of measurement and order by memory differ."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for (precision, adapter), colour in COLOURS.items():
        for p, prompt in enumerate(prompts):
            for seed in (0, 7):
                image = f"images/{precision}-{adapter}-{p}-{seed}.png"
                pixels = np.full((side, side, 3), colour, np.uint8)
                pixels[0:40:2, 1:60:2] = 0  # single dark pixels at the top left: smoothing or turning would show
                Image.fromarray(pixels).save(folder / image)
                bf16 = precision == "bf16"
                rows.append(
                    Row(
                        precision=precision,
                        adapter=adapter,
                        prompt=prompt,
                        seed=seed,
                        image=image,
                        seconds=1.0 + seed,
                        seconds_per_step=0.5,
                        weights_bytes=2 * GIB if bf16 else 700 * MIB,
                        peak_memory_bytes=(3 * GIB if bf16 else 900 * MIB) + seed,
                        scores={"psnr_bf16": None},
                        stages={"load": Stage(2.5, 1)},
                    )
                )
    sampling = {"steps": 2, "guidance": 3.5, "height": side, "width": side}
    return Comparison("<b>m</b>", "cpu: x", {"torch": "2"}, sampling, rows)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("report") / "run"
    result = comparison(folder)
    report.write(result, folder)
    return folder, result


class Page(HTMLParser):
    """Elements, their attributes, and text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))


def test_summary_equals_means_by_hand() -> None:
    def row(precision: str, adapter: str | None, seconds: float, peak: int, **scores: float | None) -> Row:
        return Row(
            precision=precision,
            adapter=adapter,
            prompt="p",
            seed=0,
            image="i",
            seconds=seconds,
            seconds_per_step=seconds / 4,
            weights_bytes=5,
            peak_memory_bytes=peak,
            scores=scores,
            stages={"load": Stage(4.0, 1)},
        )

    rows = [row("nf4", None, 1.0, 10, psnr=20.0, gone=None, right=0.0), row("bf16", None, 8.0, 40, psnr=None)]
    rows += [row("nf4", "neon", 3.0, 11), row("nf4", None, 2.0, 30, psnr=None, gone=None)]
    rows += [row("nf4", None, 6.0, 20, psnr=23.0, right=1.0)]
    first, second, third = summarise(rows)
    assert [(s.precision, s.adapter, s.images) for s in (first, second, third)] == [
        ("nf4", None, 3),
        ("bf16", None, 1),
        ("nf4", "neon", 1),
    ]
    assert first.scores == {"psnr": 21.5, "gone": None, "right": 0.5}  # each over 2, 0 and 2 of the three pictures
    assert (first.seconds, first.seconds_per_step, first.load_seconds) == (3.0, 0.75, 4.0)
    assert (first.peak_memory_bytes, first.weights_bytes) == (30, 5)
    assert second.scores == {"psnr": None} and third.scores == {}

    lines = table_of([first, second, third]).splitlines()
    assert lines[0].split("  ")[0] == "precision" and lines[0].split()[-3:] == ["psnr", "gone", "right"]
    assert [line.split()[-3:] for line in lines[2:]] == [["21.50", "-", "0.500"], ["-"] * 3, ["-"] * 3]
    assert len({len(line) for line in lines}) == 1  # every line ends in a right-aligned column


def test_json_holds_the_result_and_nothing_else_is_left(written: tuple[Path, Comparison]) -> None:
    folder, result = written
    assert read_results(folder / "results.json") == result
    names = {"images", "results.json", "comparison.png", "report.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == names


# as infer/compare.py of 2026-11-28 wrote it, on a GPU, shortened to one row: the order of keys, ints and floats count
OLD_RESULTS = """{
  "model": "black-forest-labs/FLUX.1-dev",
  "device": "NVIDIA H100",
  "versions": {
    "python": "3.12.3",
    "torch": "2.13.0"
  },
  "sampling": {
    "steps": 28,
    "guidance": 3.5,
    "height": 1024,
    "width": 1024
  },
  "rows": [
    {
      "precision": "nf4",
      "adapter": null,
      "prompt": "ein größerer “Stern”",
      "seed": 0,
      "image": "images/nf4-000-0.png",
      "seconds": 5,
      "seconds_per_step": 0.17,
      "weights_bytes": 10000000000,
      "compute_dtype": "bf16",
      "peak_memory_bytes": 12000000000,
      "scores": {
        "psnr_bf16": 31.25,
        "psnr_base": null
      },
      "stages": {
        "load": {
          "seconds": 20.5,
          "peak_memory_bytes": 12000000000,
          "peak_reserved_bytes": 12500000000
        }
      },
      "nearest": "a.png"
    }
  ],
  "drift": [],
  "summary": [
    {
      "precision": "nf4",
      "adapter": null,
      "images": 1,
      "weights_bytes": 10000000000,
      "peak_memory_bytes": 12000000000,
      "load_seconds": 20.5,
      "seconds": 5.0,
      "seconds_per_step": 0.17,
      "scores": {
        "psnr_bf16": 31.25,
        "psnr_base": null
      },
      "intervals": {
        "psnr_bf16": [
          30.0,
          32.5
        ]
      },
      "differences": {
        "bf16": {
          "right": {
            "mean": -1.0,
            "low": null,
            "high": null,
            "pictures": 1
          }
        }
      }
    }
  ],
  "references": {},
  "absent": {
    "lpips": "networks.lpips is null"
  },
  "sections": [
    {
      "title": "t",
      "lines": {
        "x": "x",
        "places": [
          1
        ],
        "series": {
          "s": [
            {
              "mean": 1
            }
          ]
        }
      }
    }
  ],
  "mine": {
    "kept": true
  }
}
"""


def test_results_of_today_are_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(OLD_RESULTS, encoding="utf-8")
    found = read_results(tmp_path / "results.json")
    assert results_text(found) == OLD_RESULTS
    assert found.rows[0].stages["load"] == Stage(20.5, 12000000000, 12500000000)
    assert found.summary is not None and isinstance(found.summary[0], Summary)
    assert found.summary[0].differences == {"bf16": {"right": Estimate(-1.0, None, None, 1)}}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["rows", 0, "seconds"], "long", r'rows\[0\].seconds is "long" and not a number'),
        (["rows", 0, "seed"], 1.5, r"rows\[0\].seed is 1.5 and not a whole number"),
        (["rows", 0, "scores", "psnr_bf16"], True, r"rows\[0\].scores.psnr_bf16 is true and not a number"),
        (["rows", 0, "stages"], [], r"rows\[0\].stages is \[\] and not an object"),
        (["rows"], {}, r"rows is \{\} and not a list"),
        (["summary", 0, "differences", "bf16", "right"], {}, "bf16.right has no mean"),
        (["model"], None, "model is null and not text"),
    ],
)
def test_wrong_values_are_named(path: list[Any], value: Any, message: str) -> None:
    content = json.loads(OLD_RESULTS)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        from_json(Comparison, content, "")


@pytest.mark.parametrize("key", ["model", "device", "versions", "sampling", "rows"])
def test_absent_keys_are_named(key: str) -> None:
    content = json.loads(OLD_RESULTS)
    del content[key]
    with pytest.raises(ValueError, match=f"it has no {key}"):
        from_json(Comparison, content, "")


def test_page_is_inert_and_self_contained(written: tuple[Path, Comparison]) -> None:
    folder, _ = written
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("dialog")) == 1
    assert not page.all("b") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"action", "srcset"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert HOSTILE in page.text and "<b>m</b>" in page.text
    policies = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")


def test_page_embeds_every_picture(written: tuple[Path, Comparison]) -> None:
    folder, result = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    shown = [(a["alt"], a["src"]) for a in page.all("img") if "src" in a]
    pixels = {decoded(src).tobytes() for _, src in shown}
    assert len(shown) == len(result.rows) == 16
    assert pixels == {np.asarray(Image.open(folder / row.image)).tobytes() for row in result.rows}
    assert [alt for alt, _ in shown[:4]] == [  # by memory from left to right, though nf4 was measured first
        "bf16, without adapter",
        "nf4, without adapter",
        "bf16, with neon & co",
        "nf4, with neon & co",
    ]
    assert sum("data-reference" in a for a in page.all("button")) == 8
    # Tables sort by exact values, not by the text that is shown: prompts, costs, scores.
    values = [a["data-value"] for a in page.all("td") if "data-value" in a]
    assert len(values) == 2 * 3 + 4 * 7 + 4 * 3
    assert values[6:10] == ["nf4", "none", str(700 * MIB), str(900 * MIB + 7)] and values[-1] == ""


def test_large_pictures_become_linked_thumbnails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, prompts=("p",))
    gradient = np.linspace(0, 255, 1024 * 512 * 3).reshape(512, 1024, 3).astype(np.uint8)
    for row in result.rows:
        row.image = "images/big one #1.png"
    Image.fromarray(gradient).save(folder / "images/big one #1.png")
    report.write(result, folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    links = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert len(links) == 8 and all((folder / unquote(link)).is_file() for link in links)
    shown = decoded(next(a["src"] for a in page.all("img") if "src" in a)).astype(float)
    assert shown.shape == (512, 1024, 3) and np.abs(shown - gradient).mean() < 3  # eight of them: at their own size


def test_many_pictures_are_reduced_together_until_they_fit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 300, 600, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, pixels in zip(files, noise, strict=True):
        Image.fromarray(pixels).save(file)
    sizes = {}
    for budget in (2**20, 2**18, 2**16, 1):
        found = gallery.embed([*files, files[0]], budget)
        assert list(found) == files and not any(picture.whole for picture in found.values())
        assert {(picture.width, picture.height) for picture in found.values()} == {(600, 300)}
        pictures = [decoded(picture.uri) for picture in found.values()]
        (side,) = {picture.shape[:2] for picture in pictures}
        sizes[budget] = side[1]
        total = sum(len(base64.b64decode(picture.uri.split(",")[1])) for picture in found.values())
        assert total <= budget or side[1] == gallery.SIDES[-1]
        for i, pixels in enumerate(noise):  # each is its own, in brightness: noise of colour is beyond WebP
            small = Image.fromarray(pixels).resize((side[1], side[0]), Image.Resampling.LANCZOS)
            apart = [np.abs(p.mean(-1) - np.asarray(small).mean(-1)).mean() for p in pictures]
            assert apart.index(min(apart)) == i and min(apart) < 0.5 * sorted(apart)[1]
    assert 600 == sizes[2**20] > sizes[2**18] > sizes[2**16] > sizes[1] == 128
    # small files are kept byte for byte, unless there are too many bytes of them
    Image.fromarray(noise[0, :100, :100]).save(files[0])
    kept = gallery.embed([files[0]])[files[0]]
    assert kept.whole and base64.b64decode(kept.uri.split(",")[1]) == files[0].read_bytes()
    assert not gallery.embed([files[0]], 10_000)[files[0]].whole


def test_figure_copies_pixels_in_order_of_memory(written: tuple[Path, Comparison]) -> None:
    folder, result = written
    pixels = np.asarray(Image.open(folder / "comparison.png").convert("RGB"))
    # Two pictures of 3 x 128, a gap, the row names and the margin: 920, less than the width a title needs.
    assert pixels.shape[1] == 1000
    boxes = {}
    for key, colour in COLOURS.items():
        y, x = np.nonzero((pixels == colour).all(-1))
        left, top = boxes[key] = x.min(), y.min()
        source = np.asarray(Image.open(folder / f"images/{key[0]}-{key[1]}-0-0.png"))
        assert (pixels[top : top + 384, left : left + 384] == np.kron(source, np.ones((3, 3, 1)))).all()
    assert boxes["bf16", None][0] < boxes["nf4", None][0] and boxes["bf16", None][1] == boxes["nf4", None][1]
    assert boxes["bf16", None][1] < boxes["bf16", "neon & co"][1]
    below = pixels[boxes["nf4", "neon & co"][1] + 384 :]
    assert len(Counter(map(tuple, below[::3, ::3].reshape(-1, 3).tolist()))) > 10  # the curves and their labels
    assert (pixels[:20] == 255).all() and (pixels[-10:] == 255).all()  # nothing runs over the edge
    assert by_memory(result.rows) == ["bf16", "nf4"]


def test_figure_reduces_large_pictures_and_grows_with_them(tmp_path: Path) -> None:
    result = comparison(tmp_path / "run", side=1024, prompts=("WIDE " * 200,))
    result.rows = [row for row in result.rows if row.adapter is None]
    report.draw_figure(result, tmp_path / "run", tmp_path / "figure.png")
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert pixels.shape[1] == 80 + 512 + 32 + 512 + 40
    y, x = np.nonzero((pixels == COLOURS["bf16", None]).all(-1))
    assert np.ptp(y) == np.ptp(x) == 511
    assert (pixels[:, :20] == 255).all() and (pixels[:, -20:] == 255).all()


@pytest.mark.parametrize(("reserved", "order"), [(1, "badc"), (None, "cabd")])
def test_precisions_are_ordered_by_peak_on_cuda_and_by_weights_on_a_cpu(
    reserved: int | None, order: str, written: tuple[Path, Comparison]
) -> None:
    load = {"load": Stage(1.0, 1, reserved)}
    rows = [
        replace(written[1].rows[0], precision=name, peak_memory_bytes=peak, weights_bytes=weights, stages=load)
        for name, peak, weights in [("a", 5, 2), ("b", 9, 1), ("c", 5, 3), ("a", 7, 1), ("d", 7, 1)]
    ]
    assert by_memory(rows) == list(order)


def test_markdown_tables_survive_pipes(written: tuple[Path, Comparison]) -> None:
    folder, _ = written
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text and r"\[l\](http://x.y) &amp; \`d\` \\" in text
    assert r"a \$x\_1\$ \| " in text and text.count("## Prompt") == 2 and text.count("### Seed 7") == 2
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 + 4
    for block in tables:
        columns = {line.replace(r"\|", "").count("|") for line in block.splitlines()}
        assert len(columns) == 1
    links = [part.split(")")[0] for part in text.split("](images/")[1:]]
    assert len(links) == 16 and all((folder / "images" / unquote(link)).is_file() for link in links)


def measured(folder: Path) -> Comparison:
    """A comparison with what else may be measured: intervals, differences, drift, training pictures, sections."""
    result = comparison(folder, prompts=("a fox", "a hen"))
    *rows, last = result.rows
    last.nearest = "<i>/deep.png"
    result.drift = [replace(row, prompt="a mill") for row in rows if row.prompt == "a hen"]
    result.summary = summarise(result.rows)
    for entry in result.summary:
        entry.scores |= {"psnr_bf16": 31.25, "kid": None}
        entry.intervals = {"psnr_bf16": [30.5, 32.0]}
        entry.differences = {"base": {"psnr_bf16": Estimate(-1.5, -2.0, -1.0)}, "bf16": {}}
    result.absent = {"lpips": "no <network> here"}
    result.references = References("<f>", 3, 0.5)
    values = {
        "columns": ["nf4", "bf16"],
        "rows": ["trained <nf4>"],
        "values": [[{"mean": 1.5, "low": 1, "high": 2}, 7]],
    }
    result.sections = [
        {"title": "Transfer <x>", "note": "rows: trained at", "matrix": values},
        {"title": "By time", "lines": {"x": "t", "places": [0, 0.5, 2], "series": {"nf4": [1, None, {"mean": 3}]}}},
        {"title": "Layers", "table": {"columns": ["layer", "error"], "rows": [["a|b", 0.25], ["c", None]]}},
    ]
    return result


def test_whatever_else_was_measured_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = measured(folder)
    report.write(result, folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.text.count("31.25") == page.text.count("30.50 to 32.00") == 4
    assert page.text.count("-1.500") == page.text.count("-2.000 to -1.000") == 4
    assert "Not measured: lpips (no <network> here)." in page.text
    note = "Below each mean its 95 % bootstrap interval over prompts and seeds. "
    assert f"{note}Training pictures: 3 in <f>; among themselves nearest_rms 0.500." in page.text
    assert (
        sum(
            "nearest training picture <i>/deep.png" in a["data-scores"]
            for a in page.all("button")
            if "data-scores" in a
        )
        == 1
    )
    assert "Prompt 3 (one of the unrelated prompts, where nothing should change)" in page.text and "a mill" in page.text
    assert {"Transfer <x>", "rows: trained at", "trained <nf4>", "1 to 2".replace("1 to 2", "1.000 to 2.000")} <= set(
        page.text
    )
    assert len([a for a in page.all("section") if a["id"].startswith("more-")]) == 3
    hints = [t for t in page.text if t.startswith("nf4, ")]
    assert {"nf4, 0: 1.000", "nf4, 2: 3.000"} <= set(hints)
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert "| nf4 | none | 31.25 (30.50 to 32.00) | - |" in lines
    assert "| trained &lt;nf4&gt; | 1.500 (1.000 to 2.000) | 7.000 |" in lines
    assert "| 0.5 | - |" in lines and r"| a\|b | 0.250 |" in lines and "| c | - |" in lines
    assert "Not measured: lpips (no &lt;network&gt; here)." in lines
    shown = differences_of(result.summary).splitlines()
    assert shown[0].split() == ["precision", "adapter", "against", "psnr_bf16"] and len(shown) == 2 + 4
    assert shown[2].split() == ["nf4", "none", "no", "adapter", "-1.500", "(-2.000", "to", "-1.000)"]
    assert differences_of(summarise(result.rows)) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.0000"), (-2e-5, "-2.0e-05"), (0.01234, "0.0123"), (-0.5, "-0.500"), (9.87654, "9.877")],
)
def test_numbers_have_about_three_digits(value: float | None, text: str) -> None:
    assert cells.number(value) == text


def test_long_tables_are_cut_to_lines_of_the_terminal(tmp_path: Path) -> None:
    result = comparison(tmp_path / "run", prompts=("p",))
    for row in result.rows:
        row.scores = {f"a_score_of_length_{i}": float(i) for i in range(12)}
    parts = table_of(summarise(result.rows)).split("\n\n")
    assert len(parts) == 3 and all(len(line) <= 160 for part in parts for line in part.splitlines())
    assert all(part.splitlines()[3].split()[:2] == ["nf4", "neon"] for part in parts)
    titles = [title for part in parts for title in part.splitlines()[0].split("  ") if title.strip()]
    assert sum(title.strip().startswith("a_score") for title in titles) == 12


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"title": "t"}, "'t' has nothing"),
        ({"title": "t", "table": {}, "matrix": {}}, "it needs one of table, lines, matrix"),
        ({"title": "t", "table": {"columns": ["a"], "rows": [[1, 2]]}}, "2 values where there are 1"),
        ({"title": "t", "lines": {"x": "x", "places": [1, 2], "series": {"s": [1]}}}, "1 values where there are 2"),
    ],
)
def test_sections_that_cannot_be_shown_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sections.to_html(section)


def lines(x: Any, *named: tuple[str, list[Estimate | None]], zero: bool = False) -> str:
    return svg.draw_lines(plot.Lines("t", x, plot.series(named), zero=zero))


def test_lines_put_values_where_they_belong() -> None:
    text = lines(["a", "b"], ("one", [Estimate(0), Estimate(10, 5, 20)]), ("two", [None, None]), zero=True)
    page = Page(text)
    marks = [a["transform"] for a in page.all("path") if "transform" in a]
    room = svg.HEIGHT - svg.TOP - svg.BOTTOM
    assert [float(m.split()[1][:-1]) for m in marks] == [svg.TOP + room, svg.TOP + room / 2]  # 0 to 20
    assert [float(a["y1"]) for a in page.all("line")] == [svg.TOP + room * (1 - i / 4) for i in range(5)]
    assert "b: 10.00 (5.000 to 20.00)" in text and "two" not in "".join(page.text)
    assert lines(["a"], ("one", [None])) == ""
    assert Page(lines(["a"], ("", [Estimate(3.0)]))).all("svg")  # no range at all
    numbers = Page(lines([0, 1, 4], ("", [Estimate(v) for v in (1.0, 2.0, 3.0)]))).all("path")
    x = [float(a["transform"].split("(")[1].split()[0]) for a in numbers if "transform" in a]
    assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 20, [0, 5, 10, 15, 20]),
        (-0.013, 0.021, [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
        (29.6, 52, [20, 30, 40, 50, 60]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert plot.ticks(low, high) == pytest.approx(expected)


def test_wrong_input_is_named_and_leaves_an_old_report_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, prompts=("p",))
    (folder / "report.md").write_text("old")
    with pytest.raises(ValueError, match="got none"):
        report.write(replace(result, rows=[]), folder)
    result.rows[3].scores = {"psnr_bf16": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        report.write(result, folder)
    (folder / result.rows[2].image).unlink()
    with pytest.raises(ValueError, match=r"Row 2 \(nf4, with neon & co, seed 0\).*nf4-neon & co-0-0\.png"):
        report.write(result, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["images", "report.md"]
    assert (folder / "report.md").read_text() == "old"


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, prompts=("p",))
    monkeypatch.setattr(report, "draw_figure", lambda result, folder, path: path.write_bytes(b"new"))
    old = {name: f"old {name}".encode() for name in ("comparison.png", "report.md", "report.html", "results.json")}
    for name, data in old.items():
        (folder / name).write_bytes(data)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        report.write(result, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == old


def test_results_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, order, replace = tmp_path / "run", [], os.replace
    result = comparison(folder, prompts=("p",))
    monkeypatch.setattr(report, "draw_figure", lambda result, folder, path: path.write_bytes(b"new"))

    def record(old: Path, new: Path) -> None:
        order.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", record)
    report.write(result, folder)
    assert sorted(order[:3]) == ["comparison.png", "report.html", "report.md"] and order[3:] == ["results.json"]


def test_import_is_light() -> None:
    code = "import sys, infer.report.write; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    root = Path(report.__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_what_a_comparison_showed_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = comparison(tmp_path)
    entries = summary_of(result)
    for entry in entries:
        like = {"bf16": None, "nf4": 34.95}[entry.precision]
        entry.scores = {"psnr_bf16": like, "right": 0.5}
        if entry.adapter:
            entry.scores |= {"psnr_base": 15.0, "drift_psnr": 12.0}
            entry.differences = {"base": {"right": Estimate(0.5, 0.25, 0.75), "sure": Estimate(0.1, -0.1, 0.3)}}
    bf16, nf4 = (next(e for e in entries if e.precision == kind) for kind in ("bf16", "nf4"))
    bf16.weights_bytes, nf4.weights_bytes = 200 * 2**20, 86 * 2**20
    result = replace(result, summary=entries, absent={"kid": "a is null", "dino": "a is null", "lpips": "b is null"})
    words = in_words(result)
    assert len(words) <= 5
    assert words[1] == (
        "The transformer's weights take 200 MiB in bf16; nf4 takes 43 % of that (the likeness of its pictures to "
        "bf16's is 34.95 dB); from 30 dB on the eye hardly sees a difference."
    )
    adapter = next(entry.adapter for entry in entries if entry.adapter)
    assert words[2] == (
        f"With {adapter} the pictures depart from those without it (likeness 15.00 dB), beyond chance it changes "
        "right by +0.5 and on unrelated prompts the likeness is 12.00 dB (the higher, the less it leaks)."
    )
    assert "few: trust differences whose 95 % limits leave out 0" in words[3]
    assert unmeasured(result) == "Not measured: kid, dino (a is null); lpips (b is null)."
    print_comparison(result)
    said = capsys.readouterr().out
    assert " ".join(said.split()).startswith(" ".join(words)) and max(map(len, said.splitlines())) <= 100
    assert "psnr_bf16 ↑" in said and "psnr_base ↑" not in said
    for name in ("psnr_bf16", "psnr_base", "right", "drift_psnr"):
        assert sum(line.startswith(f"{name}: ") for line in said.splitlines()) == 1


def test_every_score_says_which_way_is_better() -> None:
    known = {name for names in GIVES.values() for name in names} - {"lpips"} | {"nearest_rms"}
    for name in known | {f"{kind}_bf16" for kind in ("psnr", "ssim", "latents", "lpips")}:
        assert meaning(name).endswith(("higher is better", "lower is better")), name
        assert arrow(name).strip() in ("↑", "↓")
    assert arrow("psnr_base") == arrow("right") == "" and arrow("drift_latents") == " ↓"
