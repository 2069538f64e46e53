"""The rig itself: what it says of a page that sends requests, fails, overflows or follows the colour scheme."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests import conftest

if TYPE_CHECKING:
    from tests.browser import Browser

PAGE = """<!doctype html><title>t</title><meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { margin: 0; background: #fff } div { width: 300px }
@media (prefers-color-scheme: dark) { body { background: #000 } }</style>
<div>wide</div><img src="beside.png" alt=""><button>one</button><input aria-label="two">
<script>document.querySelector("button").onclick = () => { undefined_name(); };</script>"""


def test_it_sees_requests_errors_width_and_colours(browser: "Browser", tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE)
    Image.new("RGB", (1, 1)).save(tmp_path / "beside.png")
    browser.open(page)
    assert browser.requests() == [page.as_uri(), (tmp_path / "beside.png").as_uri()]
    assert browser.problems() == [] and browser.overflow() == 0
    browser.find("button").click()
    assert "undefined_name" in "".join(browser.problems())
    assert list(browser.tab_stops()) == ["one", "two"]
    colours = []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.shot(tmp_path / "shot.png")
        with Image.open(tmp_path / "shot.png") as shot:
            colours.append(shot.convert("RGB").getpixel((640, 800)))
    assert colours == [(255, 255, 255), (0, 0, 0)]
    browser.size(200, 400, phone=True)
    assert browser.overflow() == 100
    assert browser.js("return matchMedia('(pointer: coarse)').matches && devicePixelRatio === 2")


@pytest.mark.parametrize(("in_ci", "outcome"), [(True, "failed"), (False, "skipped")])
def test_without_a_browser_tests_are_skipped_but_never_in_ci(
    monkeypatch: pytest.MonkeyPatch, in_ci: bool, outcome: str
) -> None:
    monkeypatch.setattr("tests.browser.IN_CI", in_ci)
    monkeypatch.setattr("shutil.which", lambda name: None)
    start = conftest.browser.__wrapped__  # type: ignore[attr-defined]
    with pytest.raises(pytest.fail.Exception if outcome == "failed" else pytest.skip.Exception, match="Chromium"):
        next(start())
