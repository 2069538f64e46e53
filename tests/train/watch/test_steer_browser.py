"""A run from the form to its end, as a person does it: start, watch, sample, save, stop, choose, draw, go on.

One training of the bundled model, whose steps follow each other: each fixture does the next thing on the page.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from infer.adapter.read import FILE, read_pairs
from infer.resident.settings import STATE
from scripts.tiny.make_style import make_style
from tests.train.watch.conftest import Served, serving
from tests.train.watch.test_watch_browser import press, said, text, visit

if TYPE_CHECKING:
    from tests.browser import Browser

LONG = 120.0  # seconds that a process may take to start and to train some steps, on a busy machine
MORE = """data.batch_size=1
memory.compile=false
validate_every=30
save_every=0
save_minutes=0
preview_every=0
sampling.steps=1
precision=bf16
ema=0.5
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page over a folder with the demo's pictures and nothing else."""
    folder = tmp_path_factory.mktemp("home")
    make_style(folder / "runs" / "demo-pictures", 12, 0)
    yield from serving(folder)
    state = folder / STATE
    if state.is_file() and (said := json.loads(state.read_text()))["state"] != "ended":
        os.kill(said["pid"], signal.SIGKILL)  # a test has failed, and left it


def events(home: Served) -> list[dict[str, Any]]:
    file = home.folder / "runs" / "mine" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(home: Served, **wanted: Any) -> dict[str, Any]:
    """The run, once it is so."""
    end = time.monotonic() + LONG
    while True:
        try:
            run = home.get("/api/run?name=mine")
        except AssertionError:  # its folder is not there yet
            run = {}
        if run and all(run[key] == value for key, value in wanted.items()):
            return dict(run)
        assert time.monotonic() < end, (run, home.get("/api/runs")["jobs"])
        time.sleep(0.1)


@pytest.fixture(scope="module")
def started(browser: "Browser", home: Served) -> dict[str, str]:
    """The demo started from the form; what the page said."""
    visit(browser, home, "/start", "document.querySelector('form')")
    browser.find("input[name=run]").send_keys("mine")
    browser.js("document.querySelector('select[name=preset]').value = 'demo'")
    browser.find("input[name=trigger]").send_keys("zelk style")
    browser.find("input[name=steps]").send_keys("400")
    browser.find("textarea[name=previews]").send_keys("zelk style, a red star")
    browser.find("textarea[name=more]").send_keys(MORE)
    browser.wait("document.querySelector('.command code')?.textContent.includes('precision=bf16')")
    command = text(browser, ".command code")
    press(browser, "Start, after what waits")
    said(browser, "run mine is in the queue")
    return {"command": command, "hash": str(browser.js("return location.hash"))}


@pytest.fixture(scope="module")
def watched(browser: "Browser", home: Served, started: dict[str, str]) -> dict[str, Any]:
    """The run as it trains: what the page showed, then previews and a checkpoint that were asked for."""
    browser.wait("document.querySelector('.state')?.textContent === 'training'", seconds=LONG)
    browser.wait("document.querySelector('.chart path')", seconds=30)
    first = text(browser, ".tiles")
    browser.wait("document.querySelector('.tiles').innerText !== arguments[0]", first, seconds=30)
    press(browser, "Sample now")
    said(browser, "previews are drawn after this step")
    press(browser, "Save now")
    said(browser, "a checkpoint is written after this step")
    end = time.monotonic() + LONG
    while True:
        run = home.get("/api/run?name=mine")
        if run["previews"] and run["checkpoints"]:
            break
        assert run["state"] == "training" and time.monotonic() < end, run
        time.sleep(0.1)
    return {"run": run, "first": first}


@pytest.fixture(scope="module")
def stopped(browser: "Browser", home: Served, watched: dict[str, Any]) -> dict[str, Any]:
    """The run stopped from the page."""
    press(browser, "Stop gently")
    said(browser, "with its state saved")
    run = wait_for(home, state="stopped")
    browser.wait("document.querySelector('.state')?.textContent === 'stopped'")
    return run


def test_the_form_starts_what_it_shows(started: dict[str, str], home: Served) -> None:
    assert started["command"].startswith("python train/train.py experiment=demo run=mine data.path=runs/demo-pictures")
    assert started["hash"] == "#/run/mine/watch"
    (job,) = home.get("/api/runs")["jobs"]
    assert job["words"][:3] == ["train/train.py", "experiment=demo", "run=mine"] and job["queued"]


def test_it_is_watched_while_it_trains(watched: dict[str, Any]) -> None:
    assert "of 400" in watched["first"] and "Time left" in watched["first"]


def test_a_second_start_of_the_same_run_is_refused(watched: dict[str, Any], home: Served) -> None:
    status, answer = home.post("/api/start", what="go on", run="mine")
    assert status == 400 and "is running already" in answer["error"]


def test_previews_and_a_checkpoint_come_when_asked_for(watched: dict[str, Any]) -> None:
    """Neither was due: the run has save_every=0, and previews at its end alone."""
    run = watched["run"]
    assert 0 < run["previews"][0] < 400 and 0 < run["checkpoints"][0] < 400


def test_stopping_saves_the_last_step(stopped: dict[str, Any], home: Served) -> None:
    assert stopped["reason"] == "SIGTERM" and 0 < stopped["step"] < 400
    assert stopped["checkpoints"][-1] == stopped["step"]
    (job,) = home.get("/api/runs")["jobs"]
    assert job["state"] == "stopped"


def test_the_log_is_shown(browser: "Browser", home: Served, stopped: dict[str, Any]) -> None:
    visit(browser, home, "/run/mine/log", "document.querySelector('pre')?.textContent.includes('stopped (SIGTERM)')")
    assert "validation loss" in text(browser, "pre")


def test_settings_say_the_command_and_losses_the_pictures(browser: "Browser", home: Served, stopped: Any) -> None:
    visit(browser, home, "/run/mine/settings", "document.querySelector('main table')")
    assert "run=mine" in text(browser, ".command code") and "zelk style" in text(browser, "main table")
    visit(browser, home, "/run/mine/pictures", "document.querySelector('.shot img')?.naturalWidth")
    assert "beside others" in text(browser, ".shot")


@pytest.fixture(scope="module")
def chosen(browser: "Browser", home: Served, stopped: dict[str, Any]) -> dict[str, Any]:
    """The last checkpoint drawn, scored and taken."""
    visit(browser, home, "/run/mine/choose", "document.querySelector('form')")
    browser.find("input[name=checkpoints]").send_keys(str(stopped["step"]))
    browser.find("input[name=steps]").send_keys("1")
    press(browser, "Draw and score, after what waits")
    said(browser, "the choice is in the queue")
    browser.wait("document.querySelector('.choice .best')", seconds=LONG)
    shown = text(browser, "main")
    press(browser, "Take this one")
    said(browser, "written to runs/mine/chosen")
    browser.wait("document.querySelector('main').innerText.includes('Taken: step')", seconds=LONG)
    return {"shown": shown, "step": stopped["step"]}


def test_checkpoints_are_scored_and_the_best_has_its_reason(chosen: dict[str, Any], home: Served) -> None:
    choice = json.loads((home.folder / "runs/mine/choose/choice.json").read_text())
    losses = {one["step"]: one["validation_loss_ema"] for one in events(home) if "validation_loss_ema" in one}
    (entry,) = choice["entries"]
    last = max(step for step in losses if step <= chosen["step"])
    assert entry["validation"] == losses[last] and entry["drift"] > 0 and entry["nearest"] > 0
    assert choice["average"] and "the averaged weights of each checkpoint" in chosen["shown"]
    assert "held-out" in choice["best"]["reason"] and choice["best"]["reason"] in chosen["shown"]
    assert all((home.folder / "runs/mine/choose" / image).is_file() for image in (*choice["base"], *entry["images"]))


def test_the_taken_adapter_is_the_checkpoints_average(chosen: dict[str, Any], home: Served) -> None:
    """Its product B A of every layer, with alpha / rank = 1 of the demo, against the checkpoint's tensors."""
    from safetensors.torch import load_file

    run = home.folder / "runs" / "mine"
    state = load_file(run / "checkpoints" / f"step-{chosen['step']:06d}" / "ema.safetensors")
    pairs = read_pairs(str(run / "chosen" / FILE))
    assert len(pairs) == len(state) // 2
    for layer, pair in pairs.items():
        expected = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        assert torch.equal(pair.strength * pair.up @ pair.down, expected)


@pytest.fixture(scope="module")
def drawn(browser: "Browser", home: Served, chosen: dict[str, Any]) -> str:
    """A picture drawn with the chosen adapter; its name."""
    visit(browser, home, "/run/mine/draw", "document.querySelector('form')")
    browser.find("textarea[name=prompts]").send_keys("zelk style, a blue heart")
    browser.find("input[name=seeds]").send_keys("7")
    browser.find("input[name=steps]").send_keys("1")
    press(browser, "Draw now, beside what runs")
    said(browser, "drawing starts")
    browser.wait("document.querySelector('.shot img')?.naturalWidth", seconds=LONG)
    return text(browser, ".shot span")


def test_a_picture_is_drawn_and_its_settings_are_read_back(browser: "Browser", home: Served, drawn: str) -> None:
    assert drawn == "zelk-style-a-blue-heart-7.png"
    browser.driver.refresh()
    browser.wait("document.querySelector('.shot img')")
    press(browser, "Same settings")
    browser.wait("document.querySelector('textarea[name=prompts]').value === 'zelk style, a blue heart'")
    browser.wait("document.querySelector('.command code')?.textContent.includes('out=runs/mine/drawn/002')")
    command = text(browser, ".command code")
    assert "seeds=[7]" in command and "sampling.steps=1" in command and "adapter.path=runs/mine/chosen" in command


def test_the_second_drawing_took_no_load(browser: "Browser", home: Served, drawn: str) -> None:
    """The grid was drawn by the process that drew the picture, which is there still."""
    (job, *_) = [one for one in home.get("/api/runs")["jobs"] if one["words"][0] == "infer/draw.py"]
    assert "nothing is loaded" in home.get(f"/api/job?id={job['id']}")["log"]
    browser.wait("document.querySelector('main').innerText.includes('the next drawing with it takes no loading')")


def test_a_picture_is_looked_at_and_closed_by_keyboard(browser: "Browser", home: Served, drawn: str) -> None:
    browser.find(".shot .picture").click()
    browser.wait("document.querySelector('dialog[open] img')?.naturalWidth")
    browser.press("\ue00c")
    browser.wait("!document.querySelector('dialog')")


@pytest.fixture(scope="module")
def ended(browser: "Browser", home: Served, stopped: dict[str, Any], drawn: str) -> dict[str, Any]:
    """The run gone on from the page, to the step after the next: its recorded command asks for fewer steps now."""
    latest = home.folder / "runs" / "mine" / "latest.json"
    said_before = json.loads(latest.read_text())
    fewer = f"steps={stopped['step'] + 2}"
    said_before["words"] = [fewer if word.startswith("steps=") else word for word in said_before["words"]]
    latest.write_text(json.dumps(said_before))
    visit(browser, home, "/run/mine/watch", "document.querySelector('.chart path')")
    press(browser, "Go on")
    said(browser, "in the queue: python train/train.py")
    run = wait_for(home, state="done")
    browser.wait("document.querySelector('.state')?.textContent === 'done'")
    assert home.get("/api/runs")["resident"]["reason"] == "a training has begun"
    return run


def test_it_goes_on_where_it_was_and_ends(ended: dict[str, Any], stopped: dict[str, Any], home: Served) -> None:
    assert ended["step"] == stopped["step"] + 2 and ended["adapter"]
    steps = [event["step"] for event in events(home) if "loss" in event]
    assert steps == list(range(1, ended["step"] + 1))  # nothing twice, nothing left out


def test_the_queue_has_every_command(browser: "Browser", home: Served, ended: dict[str, Any]) -> None:
    visit(browser, home, "/queue", "document.querySelectorAll('main .card').length === 5")
    states = browser.js("return [...document.querySelectorAll('main .card .state')].map((e) => e.textContent)")
    assert states == ["done", "done", "done", "done", "stopped"]
    browser.find("main .card summary").click()
    browser.wait("document.querySelector('pre.log').textContent.includes('learned: adapter norm')")
