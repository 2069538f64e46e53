"""What a person does on the page, in a browser: watch, compare, read, search, change captions; runs that are broken."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from infer.resident.state import write_state
from infer.resident.turns import drawing_turn
from tests.train.watch.conftest import Served, make_run, serving
from train.data.dataset import Data
from train.look import Look, look
from train.watch import jobs

if TYPE_CHECKING:
    from tests.browser import Browser

HOSTILE = "<img src=x onerror='window.broken=1'>\"'&"
RIGHT, HOME, TAB, ENTER, ESCAPE = "\ue014", "\ue011", "\ue004", "\ue007", "\ue00c"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page over runs in every state, some of them broken, and pictures with captions."""
    folder = tmp_path_factory.mktemp("home")
    runs = folder / "runs"
    data = {"path": "runs/set", "trigger": HOSTILE}
    done = make_run(runs / "mine", 200, 200, data=data, seed=1)
    (done / "latest.json").write_text(json.dumps({"words": ["experiment=demo", "run=mine"], "ranks": 1, "began": 1.0}))
    spike = {"step": 100, "event": "spike", "loss": 9.0, "samples": [{"sample": HOSTILE, "loss": 9.0}]}
    (done / "events.jsonl").write_text(json.dumps(spike) + "\n")
    losses = {"runs/set/a.png": [9, 2.5, 0.9], "runs/set/b.png": [9, 0.7, 0.1]}
    (done / "pictures.json").write_text(json.dumps({"step": 200, "pictures": losses, "levels": []}))
    (done / "plan.json").write_text(json.dumps({"peak_memory_bytes": 2**30, "parts": {}}))
    (done / "compare").mkdir()
    (done / "compare" / "report.html").write_text(
        "<h1>a comparison</h1><script>document.title = 'run';"
        "fetch('/api/runs').then(() => { document.body.id = 'in'; })</script>"
    )
    failed = make_run(runs / "failed", 30, 100, data=data, seed=2)
    (failed / "latest.json").write_text(json.dumps({"words": ["run=failed"], "state": "failed", "reason": HOSTILE}))
    died = make_run(runs / "died", 30, 100)
    (died / ".lock").write_text(json.dumps({"host": "?", "pid": 1, "started": 0.0}))

    (died / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": 0.0}))
    torn = make_run(runs / "torn", 5, 100)
    (torn / "config.yaml").write_bytes(b"run: torn\nsteps: [\n\xff")
    (torn / "latest.json").write_text('{"words": [')
    with (torn / "metrics.jsonl").open("a") as stream:
        stream.write('not json\n{"step": 6, "lo')
    make_run(runs / "sweep" / "rank-4", 3, 3)
    (runs / "sweep" / "report.html").write_text("<h1>a sweep</h1>")
    (runs / "alone" / "compare").mkdir(parents=True)
    (runs / "alone" / "compare" / "report.html").write_text("<h1>precisions</h1>")
    make_run(runs / "gone", 3, 3)
    make_run(runs / f"a & b {HOSTILE[1:4]}'", 3, 3)
    (runs / "set").mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (80, 60), colour).save(runs / "set" / f"{name}.png")
    (runs / "set" / "a.txt").write_text(f"a red card {HOSTILE}\n")
    (runs / "set" / "b.txt").write_text("a blue card\n")
    yield from serving(folder)


def visit(browser: "Browser", page: Served, fragment: str, ready: str) -> None:
    """Open a view as if the page had just been opened."""
    if not browser.js("return location.host").endswith(str(page.port)):
        browser.driver.get(page.address)
    browser.size(1280, 900)
    browser.scheme("light")
    browser.js("location.hash = arguments[0]", fragment)
    browser.driver.refresh()
    browser.wait(f"document.querySelector('main').children.length && {ready}")
    browser.problems(), browser.requests()


def text(browser: "Browser", selector: str) -> str:
    return str(browser.js("return document.querySelector(arguments[0]).innerText", selector))


def press(browser: "Browser", name: str) -> None:
    """Click the button of that name that can be clicked."""
    button = "[...document.querySelectorAll('button')].find((b) => b.textContent === arguments[0] && !b.disabled)"
    browser.wait(button, name)
    browser.js(f"{button}.click()", name)


def said(browser: "Browser", words: str) -> None:
    browser.wait("document.querySelector('#said').innerText.includes(arguments[0])", words)


@pytest.fixture(autouse=True)
def quiet(browser: "Browser", page: Served) -> Iterator[None]:
    """No test may leave an error in the console, run what came from a file, or ask another server for anything."""
    yield
    assert browser.problems() == []
    assert browser.js("return window.broken") is None
    assert all(url.startswith(f"http://127.0.0.1:{page.port}/") for url in browser.requests())


def test_runs_are_listed_with_their_states_and_reasons(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/runs", "document.querySelectorAll('.run').length > 5")
    states = browser.js(
        "return Object.fromEntries([...document.querySelectorAll('.run')].map((r) =>"
        " [r.querySelector('h2').textContent, r.querySelector('.state').textContent]))"
    )
    assert states == {
        "mine": "stopped", "failed": "failed", "died": "failed", "torn": "stopped", "sweep/rank-4": "stopped",
        "gone": "stopped", f"a & b {HOSTILE[1:4]}'": "stopped",
    }  # fmt: skip
    shown = text(browser, "main")
    assert HOSTILE in shown and "gone without a word" in shown and "step 200 of 200" in shown


def test_a_search_finds_runs_by_name_and_state(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/runs", "document.querySelector('.run')")
    browser.find("input[type=search]").send_keys("failed")
    assert browser.js("return document.querySelectorAll('.run').length") == 2
    assert "2 of 7 runs" in text(browser, "main")


def test_a_run_is_opened_by_keyboard(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/runs", "document.querySelector('.run')")
    stops = browser.tab_stops(6)
    assert stops[0] == "To the content" and stops[1:6] == ["flux-lora", "Runs", "Start", "Data", "Queue"]
    browser.js("document.querySelector('a.run[href*=mine]').focus()")
    browser.press(ENTER)
    browser.wait("document.querySelector('.chart path') && document.querySelector('h1').textContent === 'mine'")
    ring = "const s = getComputedStyle(document.activeElement); return document.activeElement.id"
    assert browser.js(ring) == "main"  # a reader begins at the content


def test_curves_show_what_was_written(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/watch", "document.querySelectorAll('.chart path').length > 4")
    browser.js("document.querySelector('input[type=range]').value = 0")
    browser.js("document.querySelector('input[type=range]').dispatchEvent(new Event('input'))")
    browser.js("document.querySelector('.chart svg').focus()")
    browser.press(HOME)
    assert text(browser, ".chart .read") == "step 1 · training 1"
    browser.press(RIGHT, RIGHT, RIGHT)
    assert text(browser, ".chart .read") == "step 4 · training 0.25"
    label = browser.js("return document.querySelectorAll('.chart svg')[1].getAttribute('aria-label')")
    assert label == "Validation, with fixed noise: what counts: held-out pictures from 1.5 to 0.5"
    levels = text(browser, ".charts .plain")
    assert "0.25" in levels and "-65 %" in levels and "-70 %" in levels
    assert "of 1 GiB" in text(browser, ".tiles")


def test_smoothing_scale_and_outliers_change_the_curve(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/watch", "document.querySelectorAll('.chart path').length > 4")
    path = "return [...document.querySelectorAll('.chart:first-child path[d]')].map((p) => p.getAttribute('d')).join()"
    seen = [browser.js(path)]
    for box in browser.all("main input[type=checkbox]"):
        box.click()
        seen.append(browser.js(path))
    browser.find("main input[type=range]").send_keys(HOME)
    seen.append(browser.js(path))
    assert len(set(seen)) == 4


def test_a_spike_stands_on_the_curve_with_its_pictures(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/watch", "document.querySelector('path.spike')")
    assert "spike at step 100" in browser.js("return document.querySelector('path.spike').textContent")
    assert HOSTILE in text(browser, "details")


def test_previews_are_turned_by_a_slider(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/previews", "document.querySelector('img.sheet')?.complete")
    assert text(browser, "output") == "step 200"
    browser.find("main input[type=range]").send_keys(HOME)
    browser.wait("document.querySelector('img.sheet').src.endsWith('step-000100.png')")
    browser.wait(
        "document.querySelector('img.sheet').complete && document.querySelector('img.sheet').naturalWidth === 64"
    )


def test_pictures_that_stand_out_come_first_and_the_learned_when_asked(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/pictures", "document.querySelectorAll('.shot').length === 2")
    names = "return [...document.querySelectorAll('.shot strong')].map((e) => e.textContent)"
    assert browser.js(names) == ["a.png", "b.png"] and "2.5 beside others" in text(browser, ".shot")
    browser.js(
        "const s = document.querySelector('select[name=order]'); s.value = 'learned';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert browser.js(names) == ["b.png", "a.png"]
    browser.wait("[...document.querySelectorAll('.shot img')].every((i) => i.complete && i.naturalWidth === 80)")


def test_settings_of_two_runs_are_compared(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/settings", "document.querySelector('main table')")
    assert text(browser, ".command code") == "python train/train.py experiment=demo run=mine"
    browser.js(
        "const s = document.querySelector('select[name=other]'); s.value = 'failed';"
        "s.dispatchEvent(new Event('change'))"
    )
    browser.wait("document.querySelectorAll('main tbody tr').length === 2")
    assert text(browser, "main tbody").split() == ["seed", "1", "2", "steps", "200", "100"]


def test_a_report_is_shown_inside_and_can_ask_for_nothing(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/reports", "document.querySelector('iframe')")
    browser.driver.switch_to.frame(browser.find("iframe"))
    try:
        browser.wait("document.title === 'run'")
        time.sleep(0.2)
        assert browser.js("return [document.querySelector('h1').textContent, origin, document.body.id]") == [
            "a comparison",
            "null",
            "",
        ]
    finally:
        browser.driver.switch_to.default_content()
    assert all("connect-src" in problem or "fetch" in problem or "CSP" in problem for problem in browser.problems())


def test_sweeps_and_comparisons_are_found_and_shown_inside(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/runs", "document.querySelectorAll('a[href*=reports]').length === 2")
    names = browser.js("return [...document.querySelectorAll('a[href*=reports]')].map((e) => e.textContent)")
    assert names == ["alone, comparison", "sweep, sweep"]
    browser.find("a[href='#/reports/sweep']").click()
    browser.wait("document.querySelector('h1')?.textContent === 'sweep' && document.querySelector('iframe')")
    browser.driver.switch_to.frame(browser.find("iframe"))
    try:
        browser.wait("document.querySelector('h1')?.textContent === 'a sweep'")
    finally:
        browser.driver.switch_to.default_content()


def test_the_course_of_a_run_from_a_terminal_is_told(browser: "Browser", page: Served) -> None:
    visit(
        browser,
        page,
        "/run/mine/log",
        "document.querySelectorAll('pre')[1].textContent.includes('stopped at step 200')",
    )
    lines = browser.js("return document.querySelectorAll('pre')[1].textContent.split('\\n')")
    assert lines[1:] == [
        "step 0: validation loss 1.5000", "step 100: previews", f"step 100: spike: {HOSTILE}",
        "step 200: validation loss 0.5000", "step 200: previews", "stopped at step 200",
    ]  # fmt: skip
    assert lines[0].endswith("started last") and not browser.find("select[name=job]").is_displayed()


def test_a_caption_is_changed_in_place_and_changed_back(browser: "Browser", page: Served) -> None:
    file = page.folder / "runs" / "set" / "a.txt"
    before = file.read_bytes()
    visit(browser, page, "/data", "document.querySelectorAll('.shot').length === 3")
    box = browser.find("textarea[aria-label='caption of a.png']")
    assert box.get_attribute("value") == f"a red card {HOSTILE}"
    box.clear()
    box.send_keys("a card, red")
    press(browser, "Write")
    said(browser, "a.png is written")
    assert file.read_text() == "a card, red\n"
    press(browser, "Undo the last change (a.png)")
    said(browser, "a.png is as it was")
    assert file.read_bytes() == before


def test_a_picture_without_a_caption_gets_one(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/data", "document.querySelectorAll('.shot').length === 3")
    assert "Without a caption: 1" in text(browser, "main")
    browser.find("textarea[aria-label='caption of c.png']").send_keys("a green card")
    press(browser, "Write")
    browser.wait("!document.querySelector('main').innerText.includes('Without a caption')")
    assert (page.folder / "runs" / "set" / "c.txt").read_text() == "a green card\n"
    press(browser, "Undo the last change (c.png)")
    browser.wait("document.querySelector('main').innerText.includes('Without a caption: 1')")
    assert not (page.folder / "runs" / "set" / "c.txt").exists()


def test_a_caption_that_somebody_else_changed_is_not_overwritten(browser: "Browser", page: Served) -> None:
    file = page.folder / "runs" / "set" / "b.txt"
    visit(browser, page, "/data", "document.querySelectorAll('.shot').length === 3")
    box = browser.find("textarea[aria-label='caption of b.png']")
    file.write_text("of another page\n")
    box.send_keys(" and mine")
    press(browser, "Write")
    said(browser, "was changed meanwhile")
    assert file.read_text() == "of another page\n"
    browser.wait("document.querySelector(\"textarea[aria-label='caption of b.png']\").value === 'of another page'")
    assert any("400" in problem for problem in browser.problems())  # the refusal itself


def look_at_once(job: str | None) -> None:
    """What the page's process for a job does, for a look, in this process and before the page is answered."""
    assert job is not None
    folder = jobs.job_folder(job)
    words = [word.partition("=") for word in jobs.read_job(folder)["words"][1:]]
    given = {name.removeprefix("data."): value for name, _, value in words}
    data = Data(given["path"], resolution=int(given["resolution"]), flip="flip" in given)
    code = 0
    try:
        look(Look(data=data, run=given["run"], workers=1))
    except SystemExit as left:
        code = int(str(left.code))
    jobs.set_state(folder, {"state": "failed" if code else "done", "reason": f"exit code {code}" if code else None})


def test_duplicates_broken_ones_buckets_and_crops_are_shown(
    browser: "Browser", page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "start_runner", look_at_once)
    data = page.folder / "runs" / "twins"
    data.mkdir()
    board = Image.new("RGB", (160, 80), "white")
    board.paste("red", (0, 0, 40, 40))
    for name in ("one", "same", "other"):
        (board if name != "other" else board.rotate(180)).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(f"a card {HOSTILE}")
    (data / "torn.png").write_bytes(b"no picture")
    (data / "torn.txt").write_text("a card")
    visit(browser, page, "/data/runs%2Ftwins", "document.querySelectorAll('.shot').length === 4")
    browser.find("input[name=resolution]").send_keys("64")
    browser.find("input[name=flip]").click()
    press(browser, "Look at every picture")
    browser.wait("document.querySelectorAll('.crops figure').length === 6")
    shown = text(browser, "main")
    assert "Training cannot start on this: 1 of 4 samples cannot be used" in shown
    assert "torn.png cannot be read as a picture" in shown and "The same pixels: 1 group" in shown
    names = browser.js("return [...document.querySelectorAll('.alike figcaption')].map((e) => e.textContent)")
    assert names == ["one.png", "same.png"]
    assert "same pixels as same.png" in browser.js("return document.querySelector('.marks').textContent")
    (row,) = browser.js("return [...document.querySelectorAll('.look ~ div tbody tr')].map((e) => e.innerText)")
    assert row.split("\t") == ["80 x 48", "64", "3", "17 %"]  # of 160 x 80, whose widest bucket that is
    browser.wait("[...document.querySelectorAll('.crops img')].every((i) => i.complete && i.naturalWidth === 80)")
    code = """const i = document.querySelectorAll('.crops img');
      const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      return [0, 1].map((n) => { c.drawImage(i[n], 0, 0); return [...c.getImageData(n ? 77 : 2, 2, 1, 1).data]; })"""
    assert all(
        r > 200 and g < 60 and b < 60 for r, g, b, _ in browser.js(code)
    )  # red at the left, mirrored at the right
    browser.js(
        "const s = document.querySelector('select[name=filter]'); s.value = 'twice';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert browser.js("return document.querySelectorAll('.shot').length") == 2
    browser.find(".crops .picture").click()
    browser.wait("document.querySelector('dialog[open] img')?.naturalWidth === 80")
    browser.press(ESCAPE)
    problems = browser.problems()
    assert all("torn.png" in problem and "415" in problem for problem in problems), problems  # shown as a gap
    shutil.rmtree(data)


def test_the_drawing_process_is_shown_ended_and_missed(browser: "Browser", page: Served) -> None:
    idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    visit(browser, page, "/run/mine/draw", "document.querySelector('form')")
    try:
        with drawing_turn():
            facts = {"model": "dev, nf4", "device": "a card", "bytes": 9 * 2**30, "idle": 600.0}
            write_state("waiting", **facts | {"pid": idle.pid})
            browser.wait("document.querySelector('main').innerText.includes('keeps dev, nf4, 9 GiB of a card')")
            press(browser, "Give its memory back")
            said(browser, f"kill {idle.pid}")
            assert idle.wait(10) == -signal.SIGTERM
        browser.wait("document.querySelector('.note.bad')?.innerText.includes('gone without a word')")
    finally:
        idle.kill()
        shutil.rmtree(page.folder / "runs" / ".resident")


def test_a_run_that_is_deleted_while_it_is_shown(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/gone/watch", "document.querySelector('.chart path')")
    shutil.rmtree(page.folder / "runs" / "gone")
    said(browser, "it was deleted or renamed meanwhile")
    browser.driver.refresh()
    browser.wait("document.querySelector('h1')?.textContent === 'Not there'")
    browser.problems()
    make_run(page.folder / "runs" / "gone", 3, 3)


def test_a_half_written_run_says_so(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/torn/watch", "document.querySelector('.chart path')")
    shown = text(browser, "main")
    assert "config.yaml cannot be read" in shown and "Step\n5" in shown


def test_the_form_shows_its_command_and_what_is_wrong(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/start", "document.querySelector('form')")
    browser.find("input[name=run]").send_keys("new run")
    browser.find("input[name=trigger]").send_keys("a, b's")
    browser.find("input[name=steps]").send_keys("20")
    browser.wait("document.querySelector('.command code')?.textContent.includes('steps=20')")
    assert text(browser, ".command code") == (
        """python train/train.py 'run=new run' data.path=runs/set 'data.trigger=a, b'"'"'s' steps=20"""
    )
    browser.find("textarea[name=more]").send_keys("optim.lr=-1")
    browser.wait("document.querySelector('.note.bad')?.textContent.includes('optim.lr is -1.0')")
    assert not browser.find(".command").is_displayed()
    assert any("400" in problem for problem in browser.problems())


def test_the_command_is_copied(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/run/mine/settings", "document.querySelector('.command')")
    origin = f"http://127.0.0.1:{page.port}"
    browser.cdp(
        "Browser.grantPermissions", origin=origin, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    browser.find(".command button").click()
    said(browser, "copied")
    assert browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == (
        "python train/train.py experiment=demo run=mine"
    )


VIEWS = ("/runs", "/reports/sweep", "/start", "/data", "/queue", "/run/mine/watch", "/run/mine/previews",
         "/run/mine/pictures", "/run/mine/draw", "/run/mine/choose", "/run/mine/settings", "/run/mine/log",
         "/run/mine/reports")  # fmt: skip


@pytest.mark.parametrize("width", [1280, 400])
def test_every_view_fits_the_window_in_light_and_dark(browser: "Browser", page: Served, width: int) -> None:
    for view in VIEWS:
        visit(browser, page, view, "document.querySelector('h1')")
        browser.size(width, 800, width < 700)
        assert browser.overflow() == 0, view
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            colours = """const s = getComputedStyle(document.body);
              return [s.color, s.backgroundColor].map((c) => Number(c.match(/\\d+/)[0]))"""
            ink, ground = browser.js(colours)
            assert (ink < ground) == (scheme == "light")
        nameless = """return [...document.querySelectorAll('button, select, input, textarea, iframe')].filter((e) =>
          !(e.ariaLabel || e.labels?.length || e.textContent.trim() || e.title)).map((e) => e.outerHTML)"""
        assert browser.js(nameless) == [], view


def test_the_theme_is_kept(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/runs", "document.querySelector('.run')")
    browser.js("const s = document.querySelector('#theme'); s.value = 'dark'; s.dispatchEvent(new Event('change'))")
    browser.driver.refresh()
    browser.wait("document.documentElement.dataset.theme === 'dark'")
    browser.js("const s = document.querySelector('#theme'); s.value = 'system'; s.dispatchEvent(new Event('change'))")


def test_a_page_that_is_hidden_asks_for_nothing(browser: "Browser", page: Served) -> None:
    visit(browser, page, "/runs", "document.querySelector('.run')")
    browser.js("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    time.sleep(0.3)
    browser.requests()
    time.sleep(2)
    assert browser.requests() == []


def test_two_pages_at_once_do_not_log_each_other_out(browser: "Browser", page: Served, tmp_path: Path) -> None:
    from train.watch.guard import Guard

    one, two = (Guard(None, token).cookie for token in ("a", "b"))  # type: ignore[arg-type]
    assert one != two
