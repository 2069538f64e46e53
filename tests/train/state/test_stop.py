"""Signals, the lock of a run, what a spike is, and who learns from what."""

import errno
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from infer.program.errors import STOPPED
from infer.program.paths import ROOT
from train.data.batches import SampleIndex
from train.objective.spikes import LEAST, WINDOW, remember, threshold
from train.ranks.update import batches_of_rank
from train.state import run_lock as lock
from train.state.run_lock import DEAD_AFTER, NAME, lock_run
from train.state.signals import SIGNALS, StopSignals

CHILD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from train.state.signals import StopSignals
with StopSignals() as stop:
    stop.defer()
    print("ready", flush=True)
    while not stop.requested() or sys.argv[1] == "stays":
        time.sleep(0.01)
print(stop.reason, flush=True)
sys.exit(3)
"""


def test_below_a_launcher_of_one_process_a_signal_says_that_the_launcher_leaves(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopSignals() as stop:
        stop.launcher = os.getppid()
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
    assert "The launcher leaves before that, with a traceback of its own: wait for `stopped`" in capfd.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, said in (("0", "The launcher ends with a traceback of its own: wait for `stopped`"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with StopSignals() as stop:
            stop.launcher = os.getppid()
            stop.defer()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested()
        err = capfd.readouterr().err
        assert said in err and bool(err) == bool(said)


@pytest.fixture(autouse=True)
def hangup_is_heard() -> Iterator[None]:
    """The tests may run under nohup, where SIGHUP is ignored, by the processes that they start too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_remembered_once_the_loop_runs(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(SystemExit) as ends, StopSignals():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ends.value.code == STOPPED
    with StopSignals() as stop:
        stop.defer()
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.reason == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before
    first, second = capfd.readouterr().err.strip().split("\n\n")
    assert first == f"{number.name}: stopping; nothing is lost"
    assert second == f"{number.name}: stopping; this step is finished and saved first; once more ends it at once"


def child(*command: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process = child(sys.executable, "-c", CHILD, "stays")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    # torchrun sends its own copy of what a terminal has sent to all: that one does not count, a later one does
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(signal, "SIG_DFL", signal.getsignal(signal.SIGUSR1))
    killed: list[int] = []
    with StopSignals() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        stop.requested_at -= 60
        monkeypatch.setattr(os, "kill", lambda _, number: killed.append(number))
        signal.raise_signal(signal.SIGINT)
    assert killed == [signal.SIGINT]


def test_a_closed_terminal_stops_it_and_what_it_prints_then_goes_nowhere(tmp_path: Path) -> None:
    done = tmp_path / "done"
    (tmp_path / "child.py").write_text(
        CHILD.replace("print(stop.reason, flush=True)", f"print('saved', flush=True); open({str(done)!r}, 'w').close()")
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(tmp_path / "child.py"), "goes"])
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(terminal, 100)
    assert said == b"ready\r\n"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == STOPPED
    assert done.is_file()


def test_nohup_keeps_it_running() -> None:
    process = child("nohup", sys.executable, "-c", CHILD, "goes")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "SIGTERM\n"
    assert process.wait(5) == STOPPED


def test_a_launcher_that_dies_stops_it(tmp_path: Path) -> None:
    """As `accelerate launch` does at SIGTERM, without a word to its child. A shell's end means nothing."""
    (tmp_path / "child.py").write_text(CHILD)
    for name, stops in (("accelerate", True), ("bash", False)):
        process = child("bash", "-c", f"{sys.executable} {tmp_path / 'child.py'} goes & wait # {name}")
        (own,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        assert process.stdout is not None
        if stops:
            assert process.stdout.readline() == "the launcher is gone\n"
            own.wait(5)
        else:
            time.sleep(0.3)
            assert own.is_running() and own.status() != psutil.STATUS_ZOMBIE
            own.kill()


def write_owner(file: Path, host: str, pid: int, age: float) -> None:
    file.write_text(json.dumps({"host": host, "pid": pid, "started": 1.0, "token": "x"}))
    os.utime(file, (time.time() - age, time.time() - age))


def test_a_dead_holder_is_told_from_one_that_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = tmp_path / NAME, []
    with lock_run(tmp_path, pytest.fail):
        owner = json.loads(file.read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is training in .*; wait for it, stop it"):
            lock_run(tmp_path, pytest.fail).__enter__()
    assert file.read_text() == ""
    write_owner(file, socket.gethostname(), os.getpid(), 0)  # its number is another process's by now
    with lock_run(tmp_path, said.append):
        pass
    write_owner(file, "elsewhere", 7, DEAD_AFTER - 60)
    with pytest.raises(
        ValueError, match=r"process 7 on elsewhere .* \(its last sign of life is 2[34]\d s old; after 300"
    ):
        lock_run(tmp_path, pytest.fail).__enter__()
    write_owner(file, "elsewhere", 7, DEAD_AFTER + 60)
    with lock_run(tmp_path, said.append):
        pass
    file.write_text('{"host": "torn')
    with lock_run(tmp_path, pytest.fail):
        pass
    assert len(said) == 2
    assert said[0].startswith(f"process {os.getpid()} on {socket.gethostname()} held the run and is gone")
    assert "has given no sign of life for 36" in said[1]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    own = psutil.Process()
    text = json.dumps({"host": socket.gethostname(), "pid": own.pid, "started": own.create_time(), "token": "x"})
    file.write_text(text)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        lock_run(tmp_path, pytest.fail).__enter__()
    assert file.read_text() == text
    write_owner(file, socket.gethostname(), os.getpid(), 0)
    with lock_run(tmp_path, said.append):
        assert "is gone" in said[2]


def test_a_lock_beats_and_notices_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    file = tmp_path / NAME
    with lock_run(tmp_path, pytest.fail) as hold:
        os.utime(file, (0, 0))
        time.sleep(0.5)
        assert time.time() - file.stat().st_mtime < 60
        hold.check()
        write_owner(file, "elsewhere", 7, 0)
        with pytest.raises(ValueError, match="no longer names this process: another one took the run over"):
            hold.check()
    assert json.loads(file.read_text())["host"] == "elsewhere"  # not ours to clear
    with lock_run(tmp_path / "other", pytest.fail) as hold:
        (tmp_path / "other" / NAME).unlink()
        with pytest.raises(ValueError, match="or the file was deleted"):
            hold.check()


@given(st.lists(st.floats(1e-3, 1e3), min_size=LEAST, max_size=WINDOW), st.floats(1, 9))
def test_a_spike_is_far_above_the_median(losses: list[float], deviations: float) -> None:
    limit = threshold(losses, deviations)
    assert limit is not None
    logs = np.log(losses)
    spread = max(median_abs_deviation(logs, scale="normal"), 0.05)
    assert np.log(limit) == pytest.approx(np.median(logs) + deviations * spread, abs=1e-3)


def test_spikes_need_a_past_and_can_be_switched_off() -> None:
    assert threshold([1.0] * (LEAST - 1), 6) is None and threshold([1.0] * 50, 0) is None
    losses: list[float] = []
    for i in range(WINDOW + 7):
        losses = remember(losses, float(i))
    assert losses == [float(i) for i in range(7, WINDOW + 7)]
    # scattered by factors as flow losses are: none of 2,000 is a spike, ten times the largest is
    scattered = np.random.default_rng(0).lognormal(-1, 0.7, 2000).tolist()
    for i in range(WINDOW, 2000):
        limit = threshold(scattered[i - WINDOW : i], 6)
        assert limit is not None and scattered[i] < limit < 10 * max(scattered) * 10


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_any_number_of_ranks_learns_from_the_same(
    ranks: int, original_ranks: int, size: int, accumulation: int, data: st.DataObject
) -> None:
    """Each sample of each batch once, at the weight that makes the mean over the ranks the mean over the batch."""
    batches = [
        [SampleIndex(0, 100 * i + j, j, 0) for j in range(data.draw(st.integers(1, size * original_ranks)))]
        for i in range(accumulation)
    ]
    every = [batches_of_rank(batches, rank, ranks, size, original_ranks) for rank in range(ranks)]
    assert len({len(parts) for parts in every}) == 1  # gradients are exchanged after the last
    counted: dict[SampleIndex, float] = {}
    for part in (part for parts in every for part in parts):
        assert 1 <= len(part.indices) <= size
        for index in part.indices:
            if part.weight:
                assert index not in counted
                counted[index] = part.weight / ranks
    assert counted == {index: pytest.approx(1 / len(batch)) for batch in batches for index in batch}
    used = [(part.micro, part.slot) for parts in every for part in parts]
    assert len(set(used)) == len(used)  # dropout of their own
    if ranks == original_ranks:
        assert all(part.slot == rank for rank, parts in enumerate(every) for part in parts)
