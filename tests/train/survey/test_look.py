"""The look at the data: its counts against what was put there, its page against what an independent parser reads."""

import base64
import io
import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from infer.checkpoint.model import Model
from infer.program.paths import ROOT
from tests.forked import Forked
from train.data.dataset import Data, Prior
from train.data.source import Source
from train.look import Look, look

if TYPE_CHECKING:
    from tests.browser import Browser

HOSTILE = "sks, <script>alert(1)</script> </style> <img src=x onerror=\"alert(2)\"> & 'quoted'"
VOID = {"img", "input", "meta", "br"}


class Page(HTMLParser):
    """Elements with their attributes and the text directly within them; the text of the whole page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in VOID:
            self.open.append(self.elements[-1][2])

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text).strip() for name, _, text in self.elements if name == tag]

    def pictures(self) -> list[tuple[str, np.ndarray]]:
        sources = [attributes["src"] for name, attributes, _ in self.elements if name == "img"]
        return [(s[:15], np.asarray(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))))) for s in sources]


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """A picture of its own that JPEG keeps well."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def put(file: Path, picture: Image.Image, caption: str | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], options: Look) -> tuple[int, dict[str, Any], str, Page]:
    """Exit code, the JSON of the last line, the whole output and the page."""
    code = 0
    try:
        look(replace(options, json=True))
    except SystemExit as leave:
        code = int(str(leave.code))
    output = capsys.readouterr().out
    counts = json.loads(output.rstrip("\n").split("\n")[-1])
    return code, counts, output, Page(Path(counts["page"]).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pictures"


@pytest.fixture
def messy(folder: Path) -> Path:
    """Nine pictures, of which five can be used."""
    put(folder / "a.png", smooth(0, 96, 64), HOSTILE)
    put(folder / "deep/b & <b>c</b>.png", smooth(1, 64, 64), "a plain caption")
    put(folder / "copy.webp", Image.new("RGB", (1, 1)), "sks, the pixels of a.png")
    smooth(0, 96, 64).save(folder / "copy.webp", lossless=True)
    put(folder / "near.jpg", smooth(0, 96, 64).resize((144, 96)), "sks, the same, enlarged")
    put(folder / "small.png", smooth(2, 32, 48), "a plain caption")
    put(folder / "bare.png", smooth(3, 64, 64), None)
    put(folder / "blank.png", smooth(4, 64, 64), " \n")
    put(folder / "thin.png", smooth(5, 64, 9), "sks, nine pixels high")
    put(folder / "torn.png", smooth(6, 64, 64), "sks, torn")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[5:])
    return folder


BROKEN = {"bare.png": "no caption", "blank.png": "empty", "thin.png": "64x9", "torn.png": "no format that is read"}


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_all_that_is_broken_is_listed(messy: Path, tiny: Model, capsys: Any, policy: str) -> None:
    data = Data(str(messy), resolution=64, trigger="sks", on_error=policy)
    code, counts, output, page = run(capsys, Look(tiny, data))
    assert (code, counts["can_start"]) == ((2, False) if policy == "raise" else (0, True))
    assert counts["samples"] == 5 and counts["skipped"] == sum(counts["reasons"].values()) == 4
    names, reasons = page.texts("th"), page.texts("div")
    for name, reason in BROKEN.items():
        assert str(messy / name) in names and any(reason in text for text in reasons)
        assert any(str(messy / name) in line and reason in line for line in output.split("\n"))
    if policy == "raise":
        assert "4 of 9 samples cannot be used" in output and "data.on_error=skip" in output


def test_too_little_left_is_refused(messy: Path, folder: Path, tiny: Model, capsys: Any) -> None:
    code, counts, output, page = run(capsys, Look(tiny, Data(str(messy), resolution=64, on_error="skip", least=0.6)))
    assert code == 2 and not counts["can_start"] and "data.least=0.6" in output
    assert any("data.least=0.6" in text for text in page.texts("p"))
    for name in [*BROKEN, "copy.webp", "near.jpg", "small.png", "deep/b & <b>c</b>.png"]:
        (folder / name).unlink()
    code, _, output, _ = run(capsys, Look(tiny, Data(str(messy), resolution=64)))
    assert code == 2 and "data.validation=0" in output
    put(folder / "b.png", smooth(0, 96, 64), "sks")
    code, _, output, _ = run(capsys, Look(tiny, Data(str(messy), resolution=64)))
    assert code == 2 and "the same" in output  # a copy cannot be held out from what it is a copy of
    assert run(capsys, Look(tiny, Data(str(messy), resolution=64, validation=0)))[0] == 0


def test_counts(messy: Path, tiny: Model, capsys: Any) -> None:
    data = Data(str(messy), resolution=64, trigger="sks", on_error="skip")
    _, counts, output, page = run(capsys, Look(tiny, data))
    assert (counts["exact_duplicates"], counts["near_duplicates"]) == (1, 1)
    assert (counts["without_trigger"], counts["shared_captions"], counts["texts"]) == (2, 1, 4)
    assert (counts["smaller"], counts["enlarged"], counts["masks"]) == (1, 0, 0)
    assert sum(counts["buckets"].values()) == 5 and counts["buckets"]["64: 64x64"] == 1
    assert counts["buckets"]["64: 32x48"] == 1  # small.png, at its own size
    line = next(line for line in output.split("\n") if "copy.webp" in line)
    assert "a.png" in line and "near.jpg" not in line
    notes = ["".join(text) for tag, _, text in page.elements if tag == "span"]
    assert f"same pixels as {messy / 'a.png'}" in notes and f"same pixels as {messy / 'copy.webp'}" in notes
    assert notes.count("caption shared") == notes.count("trigger added") == 2
    assert f"nearly {messy / 'near.jpg'}" in notes and f"nearly {messy / 'a.png'}" in notes


def test_tokens_are_those_of_the_models_tokenizer(messy: Path, tiny: Model, capsys: Any) -> None:
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(tiny.path, subfolder="tokenizer_2")
    captions = [HOSTILE, "sks, a plain caption", "sks, the pixels of a.png", "sks, the same, enlarged"]
    lengths = {text: len(tokenizer(text).input_ids) for text in captions}
    seen = sorted(lengths.values())[1]
    data = Data(str(messy), resolution=64, trigger="sks", on_error="skip", text_length=seen)
    _, counts, output, page = run(capsys, Look(tiny, data))
    long = [text for text, length in lengths.items() if length > seen]
    assert len(long) == counts["truncated"] == 2
    for text in long:
        assert text in page.texts("div") and f"{lengths[text]} tokens: {text}"[:100] in output
    assert all(f"{length} tokens" in page.texts("small") for length in lengths.values())


def test_without_a_tokenizer_the_rest_is_counted(messy: Path, capsys: Any) -> None:
    data = Data(str(messy), resolution=64, on_error="skip")
    code, counts, output, page = run(capsys, Look(Model("/nowhere/at all"), data))
    assert code == 0 and counts["truncated"] is None and counts["samples"] == 5
    assert "text tokens are not counted" in output and "check the spelling" in output
    assert any("text tokens are not counted" in text for text in page.texts("dd"))


def test_page_is_inert_and_self_contained(messy: Path, tiny: Model, capsys: Any) -> None:
    page = run(capsys, Look(tiny, Data(str(messy), resolution=64, trigger="sks", on_error="skip")))[-1]
    tags = [tag for tag, _, _ in page.elements]
    assert tags.count("script") == tags.count("style") == 1 and not {"b", "link", "iframe"} & set(tags)
    assert page.open == []  # every element is closed
    for _, attributes, _ in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
    assert HOSTILE in page.texts("td") and HOSTILE in page.texts("li")
    links = {attributes["href"][1:] for tag, attributes, _ in page.elements if tag == "a"}
    assert links == {attributes["id"] for tag, attributes, _ in page.elements if tag == "section"}
    assert "default-src 'none'" in next(a["content"] for t, a, _ in page.elements if "http-equiv" in a)
    assert sorted(file.name for file in Path("runs/train").iterdir()) == ["data.html", "data.json"]


def test_crops_and_masks_are_the_trainers(folder: Path, tmp_path: Path, tiny: Model, capsys: Any) -> None:
    """Against Pillow's own crop and a mask averaged by NumPy."""
    picture = smooth(7, 256, 160)
    put(folder / "a.png", picture, "sks")
    put(folder / "b.png", smooth(8, 256, 160), "sks two")
    mask = np.zeros((160, 256), np.uint8)
    mask[:, 100:] = 255
    for name in ("a.png", "b.png"):
        put(tmp_path / "masks" / name, Image.fromarray(mask), None)
    data = Data(str(folder), resolution=64, masks=str(tmp_path / "masks"), aspect=1, flip=True)
    _, counts, _, page = run(capsys, Look(tiny, data))
    assert counts["masks"] == 2 and counts["buckets"] == {"64: 64x64": 2}
    crop, cover, mirrored, mirrored_cover = page.pictures()[:4]
    expected = np.asarray(ImageOps.fit(picture, (64, 64), Image.Resampling.LANCZOS)).astype(float)
    assert (crop[0], cover[0]) == ("data:image/jpeg", "data:image/png;")
    assert np.abs(crop[1] - expected).mean() < 3 < np.abs(mirrored[1] - expected).mean()
    assert np.abs(mirrored[1] - expected[:, ::-1]).mean() < 3
    kept = mask[:, 48:208].reshape(8, 20, 8, 20).mean(axis=(1, 3)) / 255  # the middle square, in latents
    assert np.abs(cover[1][..., 3] / 150 - (1 - kept)).max() < 0.02
    assert np.array_equal(mirrored_cover[1], cover[1][:, ::-1])
    assert page.texts("span").count("64 x 64, mirrored") == 2


def test_every_resolution_and_how_much_is_cut(folder: Path, tiny: Model, capsys: Any) -> None:
    put(folder / "wide.png", smooth(9, 400, 100), "sks")
    put(folder / "square.png", smooth(10, 96, 96), "sks two")
    data = Data(str(folder), resolution=[64, 128], aspect=2)
    _, counts, _, page = run(capsys, Look(tiny, data))
    buckets = {name: int(count) for name, count in counts["buckets"].items()}
    assert buckets["64: 64x64"] == buckets["128: 96x96"] == 1 and sum(buckets.values()) == 4
    assert counts["smaller"] == 1 and "smaller than asked at 128" in page.texts("span")
    wide = next(name for name in buckets if name.startswith("64: ") and name != "64: 64x64")
    width, height = map(int, wide.removeprefix("64: ").split("x"))
    cells = page.texts("td")
    row = cells.index(f"{width} x {height}")
    share = f"{100 * (1 - (100 * width / height) / 400):.1f} %"  # its whole height, as wide as the bucket's shape
    assert cells[row : row + 5] == [f"{width} x {height}", "1", "64", share, share]
    _, counts, _, _ = run(capsys, Look(tiny, Data(str(folder), resolution=[64, 128], upscale=True)))
    assert (counts["smaller"], counts["enlarged"]) == (0, 1)  # the square at 128


def test_what_is_not_shown_is_listed(folder: Path, tiny: Model, capsys: Any) -> None:
    for i in range(9):
        put(folder / f"{i}.png", smooth(20 + i, 64, 64), f"number {i}")
    for i in range(6):
        put(folder / f"copy {i}.png", smooth(20, 64, 64), f"copy {i}")
    _, counts, _, page = run(capsys, Look(tiny, Data(str(folder), resolution=64), run="mine", shown=3))
    assert counts["page"] == "runs/mine/data.html"
    assert any(text.startswith("3 of 15 pictures") for text in page.texts("p"))
    assert len(page.pictures()) == 3 + 4  # four of the seven that are equal
    names = page.texts("td")
    assert all(str(folder / f"{i}.png") in names for i in range(9))
    rest = next(text for text in page.texts("p") if text.startswith("and "))
    assert rest == "and " + ", ".join(str(folder / f"copy {i}.png") for i in range(3, 6))


def test_sources_and_prior(folder: Path, tmp_path: Path, tiny: Model, capsys: Any) -> None:
    for i in range(3):
        put(folder / f"{i}.png", smooth(i, 64, 64), f"sks {i}")
        put(tmp_path / "other" / f"{i}.png", smooth(10 + i, 64, 64), None)
        put(tmp_path / "class" / f"{i}.png", smooth(30 + i, 64, 64), "a dog")
    sources = [Source(str(folder)), Source(str(tmp_path / "other"), repeats=2.5, weight=0.5, caption="sks other")]
    prior = Prior(path=str(tmp_path / "class"), weight=0.25, ratio=2.0)
    data = Data(sources=sources, prior=prior, resolution=64, trigger="sks")
    code, counts, _, page = run(capsys, Look(tiny, data))
    cells = page.texts("td")
    for path, rest in (
        (folder, ["training", "3", "0", "1", "1"]),
        (tmp_path / "other", ["training", "3", "0", "2.5", "0.5"]),
        (tmp_path / "class", ["prior", "3", "0", "ratio 2", "0.25"]),
    ):
        row = cells.index(str(path))
        assert cells[row + 1 : row + 6] == rest
    assert code == 0 and counts["samples"] == 9 and counts["without_trigger"] == 0


def test_terminal_takes_no_orders_from_names(folder: Path, tiny: Model, capsys: Any) -> None:
    put(folder / "a\x1b[2J.png", smooth(0, 64, 64), None)
    put(folder / "b.png", smooth(1, 64, 64), "b")
    output = run(capsys, Look(tiny, Data(str(folder), resolution=64)))[2]
    assert "\x1b" not in output and "\\x1b[2J.png" in output


def test_command(messy: Path) -> None:
    """As a person types it: the exit code, and one JSON object as the last line where it is asked for."""
    command = [str(ROOT / "train/look.py"), f"data.path={messy}", "data.resolution=64", "json=true"]
    code, said = Forked(command, Path.cwd(), os.environ, Path("said").absolute()).finish(120)
    assert code == 2
    assert said.splitlines()[-2].startswith("training cannot start: 4 of ")
    assert json.loads(said.rstrip("\n").split("\n")[-1])["skipped"] == 4


def test_wrong_options_are_refused() -> None:
    for option in ("shown", "workers", "decode_pixels"):
        with pytest.raises(ValueError, match=f"{option} is 0"):
            Look(**{option: 0})  # type: ignore[arg-type]


def test_page_in_a_browser(messy: Path, tiny: Model, capsys: Any, browser: "Browser") -> None:
    _, counts, _, _ = run(capsys, Look(tiny, Data(str(messy), resolution=64, trigger="sks", on_error="skip")))
    page = Path(counts["page"])
    browser.open(page)
    assert browser.requests() == [page.resolve().as_uri()]
    rows = "return [...document.querySelectorAll('#all tbody tr')].filter((r) => r.checkVisibility()).map((r) => "
    first = f"{rows}r.cells[arguments[0]].dataset.value)"
    browser.find("#all th:nth-child(3) button").click()
    browser.wait("document.querySelector('#all th:nth-child(3)').ariaSort === 'ascending'")
    sizes = [float(value) for value in browser.js(first, 2)]
    assert sizes == sorted(sizes) and len(sizes) == 5
    browser.find("#search").send_keys("plain caption")
    assert sorted(browser.js(first, 0)) == [str(messy / "deep/b & <b>c</b>.png"), str(messy / "small.png")]
    assert browser.find("#found").text == "2 crops and 2 lines of the table match"
    dark = []
    for theme in ("light", "dark"):  # the verdict's colour, too, follows what is chosen
        browser.js("theme.value = arguments[0]; theme.dispatchEvent(new Event('change'))", theme)
        dark.append(browser.js("return getComputedStyle(document.querySelector('.verdict')).borderLeftColor"))
    assert dark == ["rgb(46, 125, 70)", "rgb(99, 193, 131)"]
    browser.size(390, 800, phone=True)
    assert browser.overflow() == 0 and browser.problems() == []
