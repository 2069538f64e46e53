"""The report of a small comparison: numbers against hand-made ones, files against what independent parsers read."""

import base64
import errno
import io
import json
import os
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from infer import report

HOSTILE = "a $x_1$ | \"b\" 'c'\n<script>alert(1)</script> </style> [l](http://x.y) & `d` \\"
MIB, GIB = 2**20, 2**30
COLOURS = {  # precision, adapter -> the colour of its pictures
    ("nf4", None): (250, 10, 20),
    ("nf4", "neon & co"): (20, 250, 10),
    ("bf16", None): (10, 20, 250),
    ("bf16", "neon & co"): (250, 240, 30),
}


def comparison(folder: Path, side: int = 128, prompts: tuple[str, ...] = (HOSTILE, "a fox")) -> dict[str, Any]:
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
                row: dict[str, Any] = {"precision": precision, "adapter": adapter, "prompt": prompt, "seed": seed}
                row |= {"image": image, "seconds": 1.0 + seed, "seconds_per_step": 0.5, "scores": {"psnr_bf16": None}}
                row |= {"weights_bytes": 700 * MIB, "peak_memory_bytes": 900 * MIB + seed}
                row |= {"stages": {"load": {"seconds": 2.5, "peak_memory_bytes": 1}}}
                if precision == "bf16":
                    row |= {"weights_bytes": 2 * GIB, "peak_memory_bytes": 3 * GIB + seed}
                rows.append(row)
    sampling = {"steps": 2, "guidance": 3.5, "height": side, "width": side}
    return {"model": "<b>m</b>", "device": "cpu: x", "versions": {"torch": "2"}, "sampling": sampling, "rows": rows}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
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
    def row(precision: str, adapter: str | None, seconds: float, peak: int, **scores: float | None) -> dict[str, Any]:
        stages = {"load": {"seconds": 4.0}}
        numbers = {"seconds": seconds, "seconds_per_step": seconds / 4, "weights_bytes": 5, "peak_memory_bytes": peak}
        return {"precision": precision, "adapter": adapter, **numbers, "scores": scores, "stages": stages}

    rows = [row("nf4", None, 1.0, 10, psnr=20.0, gone=None, right=0.0), row("bf16", None, 8.0, 40, psnr=None)]
    rows += [row("nf4", "neon", 3.0, 11), row("nf4", None, 2.0, 30, psnr=None, gone=None)]
    rows += [row("nf4", None, 6.0, 20, psnr=23.0, right=1.0)]
    first, second, third = report.summarise(rows)
    assert [(s["precision"], s["adapter"], s["images"]) for s in (first, second, third)] == [
        ("nf4", None, 3),
        ("bf16", None, 1),
        ("nf4", "neon", 1),
    ]
    assert first["scores"] == {"psnr": 21.5, "gone": None, "right": 0.5}  # each over 2, 0 and 2 of the three pictures
    assert (first["seconds"], first["seconds_per_step"], first["load_seconds"]) == (3.0, 0.75, 4.0)
    assert (first["peak_memory_bytes"], first["weights_bytes"]) == (30, 5)
    assert second["scores"] == {"psnr": None} and third["scores"] == {}

    lines = report.table([first, second, third]).splitlines()
    assert lines[0].split("  ")[0] == "precision" and lines[0].split()[-3:] == ["psnr", "gone", "right"]
    assert [line.split()[-3:] for line in lines[2:]] == [["21.50", "-", "0.500"], ["-"] * 3, ["-"] * 3]
    assert len({len(line) for line in lines}) == 1  # every line ends in a right-aligned column


def test_json_holds_the_result_and_nothing_else_is_left(written: tuple[Path, dict[str, Any]]) -> None:
    folder, result = written
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == result
    names = {"images", "results.json", "comparison.png", "report.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == names


def test_page_is_inert_and_self_contained(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("dialog")) == 1
    assert not page.all("b") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"href", "action", "srcset"} & attributes.keys()
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert HOSTILE in page.text and "<b>m</b>" in page.text
    policies = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")


def test_page_embeds_every_picture(written: tuple[Path, dict[str, Any]]) -> None:
    folder, result = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    shown = [(a["alt"], a["src"]) for a in page.all("img") if "src" in a]
    pixels = {decoded(src).tobytes() for _, src in shown}
    assert len(shown) == len(result["rows"]) == 16
    assert pixels == {np.asarray(Image.open(folder / row["image"])).tobytes() for row in result["rows"]}
    assert [alt for alt, _ in shown[:4]] == [  # by memory from left to right, though nf4 was measured first
        "bf16, without adapter",
        "nf4, without adapter",
        "bf16, with neon & co",
        "nf4, with neon & co",
    ]
    assert sum("data-reference" in a for a in page.all("button")) == 8
    # The summary sorts by exact values, not by the text that is shown.
    values = [a["data-value"] for a in page.all("td") if "data-value" in a]
    assert len(values) == 4 * 8 and values[2:4] == [str(700 * MIB), str(900 * MIB + 7)] and values[7] == ""


def test_large_pictures_become_linked_thumbnails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, prompts=("p",))
    gradient = np.linspace(0, 255, 1024 * 512 * 3).reshape(512, 1024, 3).astype(np.uint8)
    for row in result["rows"]:
        row["image"] = "images/big one #1.png"
    Image.fromarray(gradient).save(folder / "images/big one #1.png")
    report.write(result, folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    links = [a["href"] for a in page.all("a")]
    assert len(links) == 8 and all((folder / unquote(link)).is_file() for link in links)
    small = decoded(next(a["src"] for a in page.all("img") if "src" in a)).astype(float)
    expected = gradient.reshape(256, 2, 512, 2, 3).mean((1, 3))
    assert small.shape == (256, 512, 3) and np.abs(small - expected).mean() < 3


def test_figure_copies_pixels_in_order_of_memory(written: tuple[Path, dict[str, Any]]) -> None:
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
    assert report.by_memory(result["rows"]) == ["bf16", "nf4"]


def test_figure_reduces_large_pictures_and_grows_with_them(tmp_path: Path) -> None:
    result = comparison(tmp_path / "run", side=1024, prompts=("WIDE " * 200,))
    result["rows"] = [row for row in result["rows"] if row["adapter"] is None]
    report.figure(result, tmp_path / "run", tmp_path / "figure.png")
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert pixels.shape[1] == 80 + 512 + 32 + 512 + 40
    y, x = np.nonzero((pixels == COLOURS["bf16", None]).all(-1))
    assert np.ptp(y) == np.ptp(x) == 511
    assert (pixels[:, :20] == 255).all() and (pixels[:, -20:] == 255).all()


@pytest.mark.parametrize(("load", "order"), [({"peak_reserved_bytes": 1}, "badc"), ({}, "cabd")])
def test_precisions_are_ordered_by_peak_on_cuda_and_by_weights_on_a_cpu(load: dict[str, int], order: str) -> None:
    rows = [("a", 5, 2), ("b", 9, 1), ("c", 5, 3), ("a", 7, 1), ("d", 7, 1)]
    memory = [
        {"precision": name, "peak_memory_bytes": peak, "weights_bytes": weights, "stages": {"load": load}}
        for name, peak, weights in rows
    ]
    assert report.by_memory(memory) == list(order)


def test_markdown_tables_survive_pipes(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text and r"\[l\](http://x.y) &amp; \`d\` \\" in text
    assert r"a \$x\_1\$ \| " in text and text.count("## Prompt") == 2 and text.count("### Seed 7") == 2
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 1 + 4
    for block in tables:
        columns = {line.replace(r"\|", "").count("|") for line in block.splitlines()}
        assert len(columns) == 1
    links = [part.split(")")[0] for part in text.split("](images/")[1:]]
    assert len(links) == 16 and all((folder / "images" / unquote(link)).is_file() for link in links)


def test_wrong_input_is_named_and_leaves_an_old_report_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, prompts=("p",))
    (folder / "report.md").write_text("old")
    with pytest.raises(ValueError, match="got none"):
        report.write(result | {"rows": []}, folder)
    result["rows"][3]["scores"] = {"psnr_bf16": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        report.write(result, folder)
    (folder / result["rows"][2]["image"]).unlink()
    with pytest.raises(ValueError, match=r"Row 2 \(nf4, with neon & co, seed 0\).*nf4-neon & co-0-0\.png"):
        report.write(result, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["images", "report.md"]
    assert (folder / "report.md").read_text() == "old"


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, prompts=("p",))
    monkeypatch.setattr(report, "figure", lambda result, folder, path: path.write_bytes(b"new"))
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
    monkeypatch.setattr(report, "figure", lambda result, folder, path: path.write_bytes(b"new"))

    def record(old: Path, new: Path) -> None:
        order.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", record)
    report.write(result, folder)
    assert sorted(order[:3]) == ["comparison.png", "report.html", "report.md"] and order[3:] == ["results.json"]


def test_import_is_light() -> None:
    code = "import sys, infer.report; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    root = Path(report.__file__).parents[1]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
