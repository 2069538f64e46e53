"""What goes wrong while the page is open: said on it, and nothing is lost. More of it in the browser's tests."""

import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from infer.program.paths import ROOT
from infer.resident.settings import STATE
from scripts.bench_page import Client
from tests.train.watch.conftest import Served, make_run, serving
from train.watch import app, jobs


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "runs").mkdir()
    yield from serving(folder)


def test_a_run_of_another_version_is_shown_and_drawn_with(page: Served) -> None:
    run = make_run(page.folder / "runs" / "newer", future={"a": [1]})
    text = (run / "config.yaml").read_text().replace("model:\n", "model:\n  unheard_of: 3\n  weights: checkpoint\n")
    (run / "config.yaml").write_text(text)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": {"of": 2}}\n{"step": 2, "loss": 0.5, "new": 1}\n')
    (run / "pictures.json").write_text('{"pictures": {"a.png": [1], "b.png": [3, 1.0, 0.5]}}')
    (run / "choose").mkdir()
    (run / "choose" / "choice.json").write_text("[]")
    found = page.get("/api/run?name=newer")
    assert found["settings"]["future.a"] == "[1]" and found["choice"] is None and found["step"] == 2
    assert page.get("/api/curves?name=newer")["training"]["loss"]["mean"] == [0.5]
    assert [one["name"] for one in page.get("/api/losses?name=newer")] == ["b.png"]
    status, said = page.post("/api/command", what="draw", run="newer", adapter="base", prompts="a cup")
    assert status == 200 and said["command"].startswith("python infer/draw.py model.path=somewhere precision=nf4"), said


def test_a_run_that_is_deleted_or_torn_is_said(page: Served) -> None:
    run = make_run(page.folder / "runs" / "torn")
    for name in ("config.yaml", "metrics.jsonl", "latest.json", "plan.json", "pictures.json", "events.jsonl"):
        (run / name).write_bytes(b'{"step": 1, \xff')
    found = page.get("/api/run?name=torn")
    assert found["config_broken"] and found["state"] == "stopped" and found["step"] == 0
    assert page.get("/api/curves?name=torn")["count"] == 0 and page.get("/api/losses?name=torn") == []
    status, said = page.post("/api/command", what="draw", run="torn", adapter="base", prompts="x")
    assert status == 400 and "its config.yaml is absent or broken" in said["error"]
    shutil.rmtree(run)
    status, body = page.raw("GET", "/api/run?name=torn", page.good)
    assert status == 400 and b"it was deleted or renamed meanwhile" in body
    assert "torn" not in [one["name"] for one in page.get("/api/runs")["runs"]]


def test_a_full_disk_is_said_before_and_when_it_is_full(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 300 * 2**20

    monkeypatch.setattr(app.shutil, "disk_usage", lambda folder: Usage())
    (note,) = page.get("/api/runs")["notes"]
    assert note == "the disk of runs/ has 300 MiB left: free some space, or runs will stop"

    def full(file: Path, save: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    before = page.get("/api/runs")["jobs"]
    monkeypatch.setattr(jobs, "replace_file", full)
    status, said = page.post("/api/start", what="train", run="mine", model="tiny", when="queue")
    assert status == 500 and "No space left on device" in said["error"] and "free some space" in said["error"]
    assert page.get("/api/runs")["jobs"] == before  # nothing half made is in the queue


def test_a_drawing_process_that_was_killed_is_said(page: Served) -> None:
    assert page.get("/api/runs")["resident"] is None
    STATE.parent.mkdir(parents=True)
    STATE.write_text(json.dumps({"state": "drawing", "pid": 1, "model": "dev, nf4"}))  # nobody holds its lock
    found = page.get("/api/runs")["resident"]
    assert found["state"] == "gone" and "killed, or memory ran out" in found["reason"]
    assert page.post("/api/giveback")[1] == {"error": "there is no drawing process"}


@contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """A page in a process of its own, which is killed at the end."""
    words = [sys.executable, str(ROOT / "train" / "page.py"), "port=0", "open=false"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield running, Client(running.stdout.readline().split()[1])
        finally:
            running.kill()


def test_the_queue_outlives_the_page_which_was_killed(tmp_path: Path) -> None:
    """Two trainings that fail at once, as their pictures have no captions: the second runs after the page is gone."""
    (tmp_path / "runs" / "bare").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "runs" / "bare" / "a.png")
    with process(tmp_path) as (_, client):
        for run in ("one", "two"):
            said = client.post("start", {"what": "train", "run": run, "data": "runs/bare", "when": "queue"})
            assert said["command"] == f"python train/train.py run={run} data.path=runs/bare"
    with process(tmp_path) as (_, client):
        end = time.monotonic() + 60
        found: list[dict[str, Any]] = []
        while {job["state"] for job in found} != {"failed"}:
            assert time.monotonic() < end, found
            time.sleep(0.2)
            found = client.get("/api/runs")[1]["jobs"]
    two, one = found  # the newest first
    assert (one["run"], two["run"]) == ("one", "two") and one["ended"] <= two["began"]
    assert "no caption: write a.txt beside it" in one["reason"] and "no caption" in two["reason"]
