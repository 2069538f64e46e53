"""Many runs, long runs and an idle page cost little; the queue runs one command after another; the best by its rule."""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from infer.choosing.best import Entry, choose_best
from infer.program.errors import MEND
from tests.train.watch.conftest import make_run
from train.watch import jobs, runner
from train.watch.curves import POINTS, binned, curves
from train.watch.runs import list_runs
from train.watch.serve import listen


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_thousand_runs_are_listed_within_a_second(home: Path) -> None:
    original = make_run(home / "runs" / "run-0000", 60, 100)
    files = [file for file in original.rglob("*") if file.is_file()]
    for i in range(1, 1000):
        folder = home / "runs" / f"run-{i:04d}"
        (folder / "previews").mkdir(parents=True)
        for file in files:
            (folder / file.relative_to(original)).hardlink_to(file)
    began = time.process_time()
    runs, _ = list_runs()
    took = time.process_time() - began
    print(f"{len(runs)} runs in {took:.2f} s")
    assert len(runs) == 1000 and took < 1
    assert {(run["state"], run["step"], run["steps"]) for run in runs} == {("stopped", 60, 100)}


def test_a_hundred_thousand_steps_are_ready_within_a_second_and_read_on(home: Path) -> None:
    folder = make_run(home / "runs" / "long", 1, 200_000)
    steps = np.arange(1, 100_001)
    values = 1 / np.sqrt(steps)
    line = '{"step": %d, "lr": 0.0001, "memory_gib": 6.5, "loss": %r, "gradient_norm": 0.25, "seconds": 0.4}\n'
    (folder / "metrics.jsonl").write_text(
        "".join(line % pair for pair in zip(steps.tolist(), values.tolist(), strict=True))
    )
    began = time.process_time()
    found = curves("long")
    took = time.process_time() - began
    print(f"100,000 steps in {took:.2f} s")
    assert took < 1 and found["count"] == 100_000 and len(json.dumps(found)) < 2**19
    loss = found["training"]["loss"]
    assert len(loss["step"]) <= POINTS and loss["step"][-1] == 100_000
    expected = [part.mean() for part in np.split(values, range(125, 100_000, 125))]
    np.testing.assert_allclose(loss["mean"], expected, rtol=1e-5)
    assert loss["high"][0] == 1 and loss["low"][-1] == pytest.approx(values[-1], rel=1e-5)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(line % (100_001, 5.0) + '{"step": 100002, "lo')
    began = time.process_time()
    again = curves("long")
    assert again["count"] == 100_001 and time.process_time() - began < 0.5
    (folder / "metrics.jsonl").write_text(line % (1, 2.0))  # the run started over
    assert curves("long")["training"]["loss"]["mean"] == [2.0]


def test_bins_leave_out_what_is_no_number() -> None:
    found = binned([1, 2, 3, 4, 5], [1.0, float("nan"), 3.0, float("inf"), 5.0], 2)
    assert found == {"step": [3, 5], "mean": [2.0, 5.0], "low": [1.0, 5.0], "high": [3.0, 5.0]}


def test_an_idle_page_takes_next_to_nothing_and_a_taken_port_is_said(home: Path) -> None:
    """A server of its own, as train/page.py starts it: its processor time over two seconds, and no torch in it."""
    import subprocess

    from infer.program.paths import ROOT

    words = [sys.executable, str(ROOT / "train" / "page.py"), "port=0", "open=false"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            address = page.stdout.readline()
            assert address.startswith("page: http://127.0.0.1:") and "token=" in address
            process = psutil.Process(page.pid)
            time.sleep(0.5)
            before = sum(process.cpu_times()[:2])
            time.sleep(2)
            idle = (sum(process.cpu_times()[:2]) - before) / 2
            print(f"idle: {idle:.2%} of a core, {process.memory_info().rss / 2**20:.0f} MiB")
            assert idle < 0.02
            assert not any("libtorch" in each.path for each in process.memory_maps())
            port = address.split(":")[3].split("/")[0]
            taken = subprocess.run([*words[:2], f"port={port}", "open=false"], capture_output=True, text=True)
            assert taken.returncode == MEND and f"error: port {port} is taken, perhaps by another page" in taken.stderr
            absent = subprocess.run([*words[:2], "folders=[nowhere]"], capture_output=True, text=True)
            assert absent.returncode == MEND and "folders names 'nowhere', which is no folder" in absent.stderr
        finally:
            page.terminate()
    with listen(0) as sock, pytest.raises(ValueError, match="choose another one"):
        listen(sock.getsockname()[1])


def test_the_queue_runs_one_after_another_and_says_how_each_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "start_runner", lambda job=None: None)
    script = "import sys; print(f'error: {sys.argv[1]}' if sys.argv[2] == '2' else ''); sys.exit(int(sys.argv[2]))"
    monkeypatch.setattr(runner, "argv", lambda words: [sys.executable, "-c", script, *words[1:]])
    ids = [jobs.submit(["train/train.py", f"why {code}", code], f"run-{code}", True) for code in ("0", "2", "3")]
    taken_out = jobs.submit(["train/train.py", "x", "0"], "x", True)
    jobs.cancel(taken_out)
    runner.work_off()
    found = {job["id"]: job for job in jobs.list_jobs()}
    assert [found[job]["state"] for job in ids] == ["done", "failed", "stopped"]
    assert found[ids[1]]["reason"] == "why 2" and found[taken_out]["state"] == "cancelled"
    ends = [found[job]["ended"] for job in ids]
    assert ends == sorted(ends) and all(found[a]["ended"] <= found[b]["began"] for a, b in itertools.pairwise(ids))
    with pytest.raises(ValueError, match="does not wait any more"):
        jobs.cancel(ids[0])
    (jobs.job_folder(ids[0]) / "state.json").unlink()  # by hand: the list is still shown
    said = {job["id"]: job for job in jobs.list_jobs()}
    assert said[ids[0]]["reason"] == "its state.json is gone" and said[ids[1]] == found[ids[1]]


def entry(step: int, validation: float | None, **scores: Any) -> Entry:
    return Entry(f"step-{step:06d}", step, scores.pop("weight", 1.0), validation, **scores)


@pytest.mark.parametrize(
    ("entries", "usual", "best", "why"),
    [
        ([entry(1, 0.5), entry(2, 0.4), entry(3, 0.45)], None, 2, "lowest loss of the held-out pictures (0.4000)"),
        ([entry(1, 0.402, drift=0.1), entry(2, 0.4, drift=0.3)], None, 1, "within 1 % of the lowest"),
        (
            [entry(1, 0.5, nearest=0.2), entry(2, 0.3, nearest=0.04)],
            0.2,
            1,
            "near copies of training pictures: step-000002",
        ),
        ([entry(1, 0.5, nearest=0.01), entry(2, 0.3, nearest=0.01)], 0.2, 2, "lowest loss"),
        ([entry(1, 0.5), entry(1, 0.1, weight=0.5)], None, 1, "0.5000"),
        ([entry(1, None, likeness=0.7), entry(2, None, likeness=0.6)], None, 1, "most like the training pictures"),
        ([entry(1, None), entry(2, None)], None, 2, "the newest"),
    ],
)
def test_the_best_checkpoint_follows_the_rule(entries: list[Entry], usual: float | None, best: int, why: str) -> None:
    chosen, reason = choose_best(entries, usual)
    assert chosen.step == best and chosen.weight == 1 and why in reason
