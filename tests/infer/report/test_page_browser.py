"""The report's page in a browser: what is seen, clicked and typed, against the pictures that went in."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from PIL import Image

from infer.report import write as report
from infer.report.gallery import BUDGET
from infer.report.results import Comparison, Row, Stage

if TYPE_CHECKING:
    from tests.browser import Browser

ENTER, ESCAPE, TAB, HOME = "\ue007", "\ue00c", "\ue004", "\ue011"
LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"
HOSTILE = (
    "</option></select><script>window.broken = 1</script><img src=x onerror='window.broken = 2'> \"'` & $x$",
    "قطة حمراء على سجادة, שלום 🦊👩‍👩‍👧",
    "a very long prompt, " * 150,
    "unbroken" * 100,
)
COLOURS = {  # precision, adapter -> the colour of its pictures
    ("bf16", None): (200, 40, 30),
    ("nf4", None): (180, 70, 40),
    ("bf16", "a&b"): (30, 60, 210),
    ("nf4", "a&b"): (60, 200, 120),
}


def comparison(
    folder: Path, prompts: tuple[str, ...], seeds: tuple[int, ...] = (0, 7), height: int = 96, width: int = 128
) -> Comparison:
    """Plain pictures with a dark mark at a quarter of their width and height, alike in all."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, ((precision, adapter), colour) in enumerate(COLOURS.items()):
        pixels = np.full((height, width, 3), colour, np.uint8)
        pixels[height // 4 : height // 4 + 6, width // 4 : width // 4 + 6] = 8
        for p, prompt in enumerate(prompts):
            for seed in seeds:
                image = f"images/{precision}-{adapter}-{p}-{seed}.png"
                Image.fromarray(pixels).save(folder / image)
                rows.append(
                    Row(
                        precision=precision,
                        adapter=adapter,
                        prompt=prompt,
                        seed=seed,
                        image=image,
                        seconds=4.0 - i,
                        seconds_per_step=0.1,
                        weights_bytes=2**30 >> i,
                        peak_memory_bytes=2**31 >> i,
                        scores={"psnr": None if i == 0 else 30.0 + (7 * i) % 5 + p},
                        stages={stage: Stage(1, 2**29) for stage in ("load", "denoise")},
                    )
                )
    sampling = {"steps": 2, "guidance": 3.5, "height": height, "width": width}
    return Comparison("m", "cpu: x", {"torch": "2"}, sampling, rows)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "a run #1"
    report.write(comparison(folder, ("a fox", "a hen", *HOSTILE)), folder)
    return folder / "report.html"


@pytest.fixture(autouse=True)
def quiet(browser: "Browser") -> Iterator[None]:
    """No test may leave an error in the console, nor a request for more than the page."""
    yield
    assert browser.problems() == []
    assert all(urlparse(url).path.endswith("report.html") for url in browser.requests())


def pictures(browser: "Browser", shown: bool = True) -> list[Any]:
    return [p for p in browser.all(".picture") if p.is_displayed() or not shown]


def open_viewer(browser: "Browser", index: int = 1) -> None:
    pictures(browser)[index].click()
    browser.wait("document.querySelector('#viewer').open && view.span")


def colour(browser: "Browser", x: float, y: float) -> tuple[int, ...]:
    """What is seen at a share of the stage's width and height."""
    left, top, width, height = browser.box(".stage")
    return tuple(int(v) for v in browser.pixels()[round(top + y * height), round(left + x * width)])


def close_to(seen: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= 2


def selected(browser: "Browser", name: str) -> str:
    return str(browser.js("return document.getElementById(arguments[0]).selectedOptions[0].text", name))


def mark(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is dark in a piece of the window."""
    y, x = np.nonzero((pixels < 30).all(-1))
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def test_hostile_prompts_are_text_and_nothing_is_fetched(browser: "Browser", page: Path) -> None:
    browser.open(page)
    assert browser.requests() == [page.as_uri()]
    assert browser.js("return window.broken") is None
    assert browser.js("return [...document.querySelectorAll('.text')].map((p) => p.textContent)") == [
        "a fox",
        "a hen",
        *HOSTILE,
    ]
    assert len(browser.all("script")) == 1 and not browser.all("img[src=x]")
    assert browser.js("return document.querySelectorAll('#prompt option').length") == 7
    for number, direction in ((1, "ltr"), (4, "rtl")):
        browser.js("location.hash = arguments[0]", f"#prompt-{number}")
        browser.wait(f"!document.querySelector('#prompt-{number}').hidden")
        found = browser.js(
            "return getComputedStyle(document.querySelector(arguments[0])).direction", f"#prompt-{number} .text"
        )
        assert found == direction
    browser.js("location.hash = '#prompt-5'")
    browser.wait("!document.querySelector('#prompt-5').hidden")
    assert browser.box("#prompt-5 .text")[3] < 200  # a very long one scrolls within its box


@pytest.mark.parametrize(("width", "phone"), [(1440, False), (1280, False), (390, True), (320, True)])
def test_nothing_is_wider_than_the_window(browser: "Browser", page: Path, width: int, phone: bool) -> None:
    browser.open(page, "all")
    browser.size(width, 800, phone)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.overflow() == 0
    for index in (1, 4 * 2 * 3 + 1):  # the second is of a prompt without a space
        open_viewer(browser, index)
        sticking_out = """return [...document.querySelectorAll('#viewer :not(img, option, optgroup)')].filter((e) => {
            const b = e.getBoundingClientRect();
            return b.width && e.checkVisibility() && (b.left < -1 || b.right > innerWidth + 1
              || b.bottom > innerHeight + 1); }).map((e) => e.outerHTML)"""
        assert browser.js(sticking_out) == []
        assert browser.box(".stage")[3] > 250
        browser.press(ESCAPE)


def test_slider_shows_one_picture_left_and_the_other_right(browser: "Browser", page: Path) -> None:
    browser.open(page)
    open_viewer(browser, 1)  # nf4 without adapter: its reference stands on the left
    left, right = COLOURS["bf16", None], COLOURS["nf4", None]
    assert (selected(browser, "a"), selected(browser, "b")) == ("bf16 · seed 0", "nf4 · seed 0")
    assert close_to(colour(browser, 0.4, 0.6), left) and close_to(colour(browser, 0.6, 0.6), right)
    browser.press(*[RIGHT] * 30)  # the slider has the focus
    assert browser.js("return at.value") == "80" and close_to(colour(browser, 0.6, 0.6), left)
    browser.press(HOME)
    assert close_to(colour(browser, 0.4, 0.6), right)
    x, y, width, height = browser.box(".stage")
    browser.drag(
        (x + width * 0.3, y + height / 2), (x + width * 0.5, y + height / 2), (x + width * 0.65, y + height / 2)
    )
    assert close_to(colour(browser, 0.62, 0.6), left) and close_to(colour(browser, 0.68, 0.6), right)
    browser.press("x")
    assert close_to(colour(browser, 0.62, 0.6), right) and close_to(colour(browser, 0.68, 0.6), left)
    assert "psnr 32.00" in browser.find("#about-a").text and "bf16 · seed 0" in browser.find("#about-b").text
    browser.press(ESCAPE)
    assert not browser.js("return document.querySelector('#viewer').open")
    assert browser.js("return document.activeElement === pictures[1]")


def test_any_two_pictures_can_be_compared(browser: "Browser", page: Path) -> None:
    browser.open(page)
    open_viewer(browser, 0)
    assert selected(browser, "a") == "bf16 · seed 0" and selected(browser, "b") == "nf4 · seed 0"
    options = browser.js("return document.querySelectorAll('#b option').length")
    assert options == len(pictures(browser, shown=False)) == 6 * 8
    code = """const select = document.querySelector('#b'), group = select.querySelectorAll('optgroup')[arguments[0]];
      select.value = [...group.children].find((o) => o.text === arguments[1]).value;
      select.dispatchEvent(new Event('change')); return group.label;"""
    assert browser.js(code, 1, "nf4 + a&b · seed 7") == "Prompt 2"
    assert close_to(colour(browser, 0.4, 0.6), COLOURS["bf16", None])
    assert close_to(colour(browser, 0.6, 0.6), COLOURS["nf4", "a&b"])
    assert browser.find("#which").text == "Prompt 2 of 6"


def test_difference_is_exact_and_can_be_amplified(browser: "Browser", page: Path) -> None:
    browser.open(page)
    open_viewer(browser, 1)
    browser.find("[value=difference]").find_element("xpath", "..").click()
    apart = np.abs(np.subtract(COLOURS["bf16", None], COLOURS["nf4", None]))
    for gain in (4, 5, 32):
        browser.js("gain.value = arguments[0]; gain.dispatchEvent(new Event('input'))", gain)
        assert close_to(colour(browser, 0.5, 0.7), tuple(np.minimum(apart * gain, 255)))
        assert browser.find("#times").text == str(gain)
    assert colour(browser, 0.01, 0.5) == (0, 0, 0)
    browser.find("#gain").click()
    browser.press(HOME)
    assert close_to(colour(browser, 0.5, 0.7), tuple(apart))
    assert not browser.find("#at").is_displayed()


def test_zoom_and_pan_move_both_pictures_alike(browser: "Browser", page: Path) -> None:
    browser.open(page)
    open_viewer(browser, 1)
    browser.find("[value=beside]").find_element("xpath", "..").click()

    def halves() -> tuple[np.ndarray, np.ndarray]:
        left, top, width, height = map(round, browser.box(".stage"))
        seen, half = browser.pixels()[top : top + height, left : left + width], width // 2 - 3
        return seen[:, :half], seen[:, -half:]

    def marks() -> tuple[int, int, int, int]:
        first, second = map(mark, halves())
        assert np.abs(np.subtract(first, second)).max() <= 1
        return first

    before = marks()
    scale = round((before[2] - before[0] + 1) / 6)
    assert browser.find("#scale").text == f"{100 * scale} %" and scale >= 2  # pixel for pixel
    browser.press("+")
    larger = marks()
    browser.js("stage.focus()")  # where arrow keys do not choose a view
    assert (larger[2] - larger[0]) / (before[2] - before[0]) == pytest.approx(1.5, abs=0.1)
    browser.press("+", "+", *[LEFT] * 5, *[UP] * 2)
    larger = marks()
    browser.press(RIGHT, DOWN)
    moved = marks()
    assert (moved[0] - larger[0], moved[1] - larger[1]) == (-60, -60)
    x, y, width, height = browser.box(".stage")
    browser.drag((x + width * 0.8, y + height * 0.6), (x + width * 0.8 + 25, y + height * 0.6 + 15))
    assert tuple(np.subtract(marks(), moved)) == (25, 15, 25, 15)
    # the wheel zooms about the pointer: what is under it stays
    moved = marks()
    point = (x + moved[0] + 1, y + moved[1] + 1)
    browser.cdp("Input.dispatchMouseEvent", type="mouseWheel", x=point[0], y=point[1], deltaX=0, deltaY=-240)
    browser.wait("view.z > 6")
    after = marks()
    assert max(abs(after[0] - moved[0]), abs(after[1] - moved[1])) <= 2 and after[2] > moved[2] + 30
    browser.press("0")
    assert marks() == before
    browser.press("+")
    browser.press(*["-"] * 9)
    assert marks() == before  # never smaller than the whole


def test_a_zoomed_slider_pans_beside_its_line_and_slides_on_it(browser: "Browser", page: Path) -> None:
    browser.open(page)
    open_viewer(browser, 1)
    browser.press("+", "+", "+")
    x, y, width, height = browser.box(".stage")
    browser.drag((x + width * 0.5, y + height * 0.5), (x + width * 0.7, y + height * 0.5))
    assert browser.js("return [Number(at.value), view.x]") == [pytest.approx(70, abs=1), 0]
    browser.drag((x + width * 0.2, y + height * 0.5), (x + width * 0.2 + 50, y + height * 0.5))
    assert browser.js("return [Number(at.value), view.x]") == [pytest.approx(70, abs=1), 50]


def test_tables_sort_by_click_and_key(browser: "Browser", page: Path) -> None:
    browser.open(page)

    def column(index: int) -> list[str]:
        return [row.find_elements("css selector", "td")[index].text for row in browser.all("#scores tbody tr")]

    title = browser.find("#scores th:nth-child(3) button")
    assert column(2) == ["-", "34.50", "36.50", "33.50"]
    title.click()
    assert column(2) == ["33.50", "34.50", "36.50", "-"]
    title.send_keys(ENTER)
    assert column(2) == ["36.50", "34.50", "33.50", "-"]  # what is not defined stays last
    assert [th.get_attribute("aria-sort") for th in browser.all("#scores th")] == ["none", "none", "descending"]
    browser.find("#cost th:nth-child(3) button").click()
    weights = [row.find_elements("css selector", "td")[2].text for row in browser.all("#cost tbody tr")]
    assert weights == ["128 MiB", "256 MiB", "512 MiB", "1.00 GiB"]  # by size, not by text


def test_prompts_turn_by_button_select_address_and_key(browser: "Browser", page: Path) -> None:
    browser.open(page)

    def shown() -> list[str]:
        return [section.get_attribute("id") for section in browser.all(".prompt") if section.is_displayed()]

    assert shown() == ["prompt-1"] and not browser.find("#previous").is_enabled()
    browser.find("#next").click()
    assert shown() == ["prompt-2"] and browser.find("#position").text == "2 of 6"
    assert browser.js("return location.hash") == "#prompt-2"
    browser.driver.refresh()
    assert shown() == ["prompt-2"]
    browser.find("#prompt").send_keys("4")  # the keyboard finds an option by its first letters
    browser.wait("!document.querySelector('#prompt-4').hidden")
    assert shown() == ["prompt-4"]
    browser.find("details.prompts summary").click()
    browser.find("details.prompts a[href='#prompt-1']").click()
    browser.wait("!document.querySelector('#prompt-1').hidden")
    open_viewer(browser, 3)
    browser.press("n")
    assert browser.find("#which").text == "Prompt 2 of 6" and shown() == ["prompt-2"]
    assert (selected(browser, "a"), selected(browser, "b")) == ("bf16 + a&b · seed 0", "nf4 + a&b · seed 0")
    browser.press("p", ESCAPE)
    assert shown() == ["prompt-1"]
    browser.open(page, "all")
    assert len(shown()) == 6


def test_theme_follows_the_system_until_one_is_chosen(browser: "Browser", page: Path) -> None:
    browser.open(page)
    corner = lambda: int(browser.pixels()[5, 5].sum())  # noqa: E731
    light = corner()
    browser.scheme("dark")
    dark = corner()
    assert light > 690 and dark < 120
    choose = "theme.value = arguments[0]; theme.dispatchEvent(new Event('change'))"
    browser.js(choose, "light")
    assert corner() == light
    browser.driver.refresh()
    assert corner() == light and browser.js("return theme.value") == "light"
    browser.scheme("light")
    browser.js(choose, "dark")
    assert corner() == dark
    browser.js(choose, "system")
    assert corner() == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: "Browser", page: Path, scheme: str) -> None:
    """Contrast of 4.5 or more, as WCAG 2.2 computes it, of every colour of text on what lies behind it."""
    browser.open(page, "all")
    browser.scheme(scheme)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    open_viewer(browser, 1)
    code = """const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
      const seen = new Set();
      for (const e of document.querySelectorAll('main *, #viewer *')) {
        if (!e.checkVisibility() || e.matches(':disabled, option, optgroup, .handle')) continue;
        if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
        const style = getComputedStyle(e); let back = e;
        const of = (b) => rgb(getComputedStyle(b).backgroundColor);
        while (back && of(back)[3] === 0) back = back.parentElement;
        const ink = e instanceof SVGElement ? style.fill : style.color;
        seen.add(JSON.stringify([rgb(ink).slice(0, 3), back ? of(back).slice(0, 3) : null, e.tagName]));
      }
      return [...seen].map(JSON.parse)"""

    def luminance(colour: list[float]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    found = browser.js(code)
    assert len(found) > 10
    for ink, back, tag in found:
        low, high = sorted((luminance(ink), luminance(back)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, back, tag)


def test_everything_is_reached_by_tab_and_shows_it(browser: "Browser", page: Path) -> None:
    browser.open(page)
    stops = list(browser.tab_stops())
    expected = ["Pictures", "Cost", "Scores", "Memory and time", "Scores by precision"]
    expected += ["About this comparison", "Prompt", "Next prompt"]
    assert stops[1:9] == expected
    assert stops[10:14] == ["bf16, without adapter", "nf4, without adapter", "bf16, with a&b", "nf4, with a&b"]
    assert stops[-2:] == ["adapter", "psnr ↑"]
    browser.js("pictures[0].focus()")
    browser.press(TAB, ENTER)
    browser.wait("document.querySelector('#viewer').open")
    inside, rings = [], []
    for _ in range(20):
        browser.press(TAB)
        name = browser.js("const e = document.activeElement; return e.id || e.value || e.className")
        inside.append(name)
        ring = """const e = document.activeElement, of = e.matches('[type=radio]') ? e.nextElementSibling : e;
          return parseFloat(getComputedStyle(of).outlineWidth) >= 2 && getComputedStyle(of).outlineStyle !== 'none'"""
        rings.append((name, browser.js(ring)))
    assert {"a", "b", "swap", "slide", "out", "in", "fit", "close", "at", "forth"} <= set(inside)
    assert {"prompt", "theme"}.isdisjoint(inside)  # nothing behind the dialog
    assert all(ring for name, ring in rings if name), rings  # no name: the browser's own controls
    nameless = """const all = [...document.querySelectorAll('button, select, input, [role=img], [role=region]')];
      const named = (e) => e.ariaLabel || e.labels?.length || e.textContent.trim() || e.querySelector('img[alt]')?.alt;
      return all.filter((e) => !named(e)).map((e) => e.outerHTML)"""
    assert browser.js(nameless) == []


def test_fingers_slide_pan_and_pinch(browser: "Browser", page: Path) -> None:
    browser.open(page)
    browser.size(390, 844, phone=True)
    open_viewer(browser, 1)
    x, y, width, height = browser.box(".stage")
    middle = y + height / 2
    browser.touch([(x + width / 2, middle)], [(x + width * 0.6, middle)], [(x + width * 0.75, middle)])
    share = (0.75 * width - browser.js("return view.edge")) / browser.js("return view.span")
    assert browser.js("return Number(at.value)") == pytest.approx(100 * share, abs=1)
    near, far = [(x + 150, middle), (x + 200, middle)], [(x + 75, middle), (x + 275, middle)]
    browser.touch(near, far)
    assert browser.js("return view.z") == pytest.approx(4, abs=0.2)
    browser.touch([(x + 40, middle)], [(x + 60, middle + 10)])
    assert browser.js("return view.x") != 0


def test_originals_are_read_only_when_asked_for(browser: "Browser", tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report.write(comparison(folder, ("a fox",), (0,), 600, 700), folder)
    browser.open(folder / "report.html")
    assert browser.requests() == [(folder / "report.html").as_uri()]
    assert not browser.all("#prompt")  # a single prompt needs no choice
    links = [unquote(urlparse(a.get_attribute("href")).path) for a in browser.all(".grid a")]
    assert len(links) == 4 and all(Path(link).is_file() for link in links)
    open_viewer(browser, 1)
    assert browser.find("#scale").text != "" and browser.js("return upper.src.startsWith('data:image/webp')")
    browser.find("#originals").click()
    browser.wait("upper.src.endsWith('nf4-None-0-0.png') && upper.complete && upper.naturalWidth === 700")
    assert sorted(Path(url).name for url in browser.requests()) == ["bf16-None-0-0.png", "nf4-None-0-0.png"]
    assert close_to(colour(browser, 0.6, 0.6), COLOURS["nf4", None])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(folder / "report.html", moved)
    browser.open(moved / "report.html")
    open_viewer(browser, 1)
    browser.find("#originals").click()
    browser.wait("upper.src.startsWith('data:') && lower.src.startsWith('data:')")
    assert close_to(colour(browser, 0.6, 0.6), COLOURS["nf4", None])
    assert all("ERR_FILE_NOT_FOUND" in problem for problem in browser.problems())
    browser.requests()


def test_two_hundred_pictures_stay_quick(browser: "Browser", tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = comparison(folder, tuple(f"prompt {i} of many" for i in range(25)), (0, 1), 16, 16)
    # what a photograph costs: coarse shapes and fine noise, in large pictures
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
            (576, 576), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(0, 6, (576, 576, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png", compress_level=1)
    for i, row in enumerate(result.rows):
        (folder / row.image).unlink()
        (folder / row.image).hardlink_to(folder / f"{i % 8}.png")
    begun = time.perf_counter()
    report.write(result, folder)
    written = time.perf_counter() - begun
    page = folder / "report.html"
    size = page.stat().st_size
    assert len(result.rows) == 200 and size < BUDGET * 4 / 3 + 2**20
    begun = time.perf_counter()
    browser.open(page)
    browser.wait("document.readyState === 'complete'")
    opened = time.perf_counter() - begun
    assert len(pictures(browser)) == 8
    # from the click to the frame after the next prompt's pictures are decoded
    code = """const done = arguments[0], begun = performance.now();
      document.querySelector('#next').click();
      const shown = [...document.querySelectorAll('.prompt:not([hidden]) img')];
      Promise.all(shown.map((image) => image.decode())).then(() => requestAnimationFrame(() => requestAnimationFrame(
        () => done([shown.length, performance.now() - begun]))));"""
    browser.driver.set_script_timeout(20)
    turns = [browser.driver.execute_async_script(code) for _ in range(5)]
    assert [count for count, _ in turns] == [8] * 5
    turning = sorted(seconds for _, seconds in turns)[2] / 1000
    code = """const done = arguments[0], begun = performance.now();
      document.querySelector('.prompt:not([hidden]) .picture').click();
      requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - begun)));"""
    viewing = browser.driver.execute_async_script(code) / 1000
    print(f"{size / 2**20:.1f} MiB, written in {written:.1f} s, opened in {opened:.2f} s")
    print(f"a prompt in {turning:.3f} s, the viewer in {viewing:.3f} s")
    assert opened < 6 and turning < 1 and viewing < 1
    assert browser.js("return document.querySelectorAll('#a option').length") == 200


def test_without_scripts_everything_is_there(browser: "Browser", page: Path) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert len([s for s in browser.all(".prompt") if s.is_displayed()]) == 6
        assert not browser.find(".bar").is_displayed() and not browser.find("#theme").is_displayed()
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("width", [1280, 400])
def test_many_scores_need_no_sideways_scrolling_on_a_desk_and_are_reached_on_a_phone(
    browser: "Browser", tmp_path: Path, width: int
) -> None:
    result = comparison(tmp_path, ("a fox", "a hen"))
    for row in result.rows:
        row.scores = {f"score_{i}": 0.123 for i in range(14)}
    report.write(result, tmp_path)
    browser.open(tmp_path / "report.html")
    browser.size(width, 900)
    browser.js("document.querySelectorAll('details').forEach(each => each.open = true)")
    inside = browser.js("return [...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
    assert len(inside) > 4 and browser.js("return document.documentElement.scrollWidth") <= width
    if width == 1280:
        assert all(needs <= has for needs, has in inside)
    else:
        reached = """const [e] = arguments; e.scrollLeft = 1e6; const last = e.querySelector('th:last-child');
          return last.getBoundingClientRect().right <= e.getBoundingClientRect().right + 1"""
        assert all(browser.driver.execute_script(reached, each) for each in browser.all(".scroll"))
