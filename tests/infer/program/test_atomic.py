"""What is left of processes that were killed, and what others are still writing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infer.program import atomic
from infer.program.atomic import STALE, clear_partials, partial_of, replace_file


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_what_nobody_is_writing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.socket, "gethostname", lambda: "node-7.cluster.local")
    dead = ended()
    here = partial_of(tmp_path / "compare").name
    assert here == f"compare.node-7-cluster-local.{os.getpid()}.partial"
    gone = [here, f"compare.node-7-cluster-local.{dead}.partial"]
    stays = [
        f"compare.node-7-cluster-local.{os.getppid()}.partial",  # lives
        f"compare.node-8.{dead}.partial",  # of another machine, where that number may live
        f"compare.node-8.{os.getpid()}.partial",
        f"compare.{dead}.partial",  # of an earlier version, which did not say the machine
        f"compare.png.node-7-cluster-local.{dead}.partial",  # of compare.png
        f"compare.a.b.{dead}.partial",
        "compare.partial",
    ]
    for name in (*gone[:1], *stays[:2]):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "0.png").write_bytes(b"a")
    for name in (*gone[1:], *stays[2:]):
        (tmp_path / name).write_bytes(b"a")
    clear_partials(tmp_path, "compare")
    assert {path.name for path in tmp_path.iterdir()} == set(stays)

    # a day later, one of them has been written to meanwhile
    now = time.time()
    monkeypatch.setattr(atomic.time, "time", lambda: now + STALE + 60)
    status = os.lstat(tmp_path / stays[2])
    lstat = Path.lstat

    def later(path: Path) -> os.stat_result:
        own = list(lstat(path))
        if path == tmp_path / stays[1] / "images" / "0.png":
            own[9] = int(status.st_ctime + STALE)  # st_ctime
        return os.stat_result(own)

    monkeypatch.setattr(Path, "lstat", later)
    clear_partials(tmp_path, "compare")
    assert {path.name for path in tmp_path.iterdir()} == {stays[0], stays[1], *stays[4:]}


def test_two_machines_write_one_file_of_a_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_slowly(path: Path) -> None:
        path.write_text("of node 1")
        with monkeypatch.context() as patch:
            patch.setattr(atomic.socket, "gethostname", lambda: "node2")
            patch.setattr(atomic.os, "getpid", ended)
            replace_file(tmp_path / "report.md", lambda other: other.write_text("of node 2"))

    monkeypatch.setattr(atomic.socket, "gethostname", lambda: "node1")
    number = os.getpid()
    monkeypatch.setattr(atomic, "_alive", lambda pid: pid == number)
    replace_file(tmp_path / "report.md", write_slowly)
    assert (tmp_path / "report.md").read_text() == "of node 1"
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
