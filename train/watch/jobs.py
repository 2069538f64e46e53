"""Commands that the page starts: each a folder in runs/.page/jobs/ with its command, its log and its state.

    job.json    {"id": "20261128-081502-000001", "words": ["train/train.py", "run=mine", ...], "run": "mine", ...}
    state.json  {"state": "waiting"}, then running with the process, then done, stopped, failed or cancelled
    log.txt     what the command prints

A job waits in the queue, of which a process of its own runs one after another (train/watch/runner.py), or starts at
once. The page can be closed and opened again meanwhile: nothing of this lives in it.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file
from infer.program.paths import ROOT
from train.watch.places import PRIVATE, RefusedError, runs_folder
from train.watch.states import alive, read_json

ID = re.compile(r"\d{8}-\d{6}-\d{6}")
LOG = 2**16  # bytes of a log that are shown
PROGRAMS = ("train/train.py", "train/look.py", "train/plan.py", "infer/draw.py", "infer/choose.py", "infer/compare.py")
SHOWN = 200  # latest jobs that are listed


def jobs_folder() -> Path:
    return runs_folder() / PRIVATE / "jobs"


def job_folder(job: str) -> Path:
    """Raises:
    RefusedError: there is no such job.
    """
    folder = jobs_folder() / job
    if not ID.fullmatch(job) or not folder.is_dir():
        raise RefusedError(f"there is no job {job!a}")
    return folder


def argv(words: list[str]) -> list[str]:
    """What is executed for a command, without a shell."""
    assert words[0] in PROGRAMS, words
    return [sys.executable, str(ROOT / words[0]), *words[1:]]


def submit(words: list[str], run: str, queued: bool) -> str:
    """Put a command into the queue, or start it at once; returns the job's id."""
    assert words[0] in PROGRAMS, words
    now = time.time()
    folder, number = jobs_folder(), int(now % 1 * 1e6)
    while True:
        job = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{number % 1000000:06d}"
        try:
            (folder / job).mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    said = {"id": job, "words": words, "run": run, "queued": queued, "made": now}
    _write(folder / job / "state.json", {"state": "waiting"})
    _write(folder / job / "job.json", said)  # last: without it the folder is no job yet
    start_runner(None if queued else job)
    return job


def start_runner(job: str | None = None) -> None:
    """Start the process that works off the queue, or one for a single job. It outlives the page; where one works
    already, it leaves at once."""
    words = [sys.executable, "-m", "train.watch.runner", *([job] if job else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def list_jobs(most: int = SHOWN) -> list[dict[str, Any]]:
    """The latest jobs, the newest first."""
    folder = jobs_folder()
    names = [each.name for each in folder.iterdir() if ID.fullmatch(each.name)] if folder.is_dir() else []
    return [found for name in sorted(names, reverse=True)[:most] if (found := read_job(folder / name))]


def read_job(folder: Path) -> dict[str, Any]:
    """A job with its state; empty if it is none."""
    said = read_json(folder / "job.json")
    words = said.get("words")
    if not isinstance(words, list) or not words or said.get("id") != folder.name:
        return {}
    found = {key: said.get(key) for key in ("id", "words", "run", "queued", "made")}
    found |= {"reason": None} | read_json(folder / "state.json")
    if not isinstance(found.get("state"), str):
        return found | {"state": "failed", "reason": "its state.json is gone"}
    if found["state"] == "running" and not alive(found.get("pid"), found.get("started")):
        # read again: it may have ended between the two
        found |= read_json(folder / "state.json")
        if found["state"] == "running" and not alive(found.get("runner"), found.get("runner_started")):
            found |= {"state": "failed", "reason": "its process is gone without a word"}
    return found


def cancel(job: str) -> None:
    """Take a waiting job out of the queue.

    Raises:
        RefusedError: it does not wait any more.
    """
    folder = job_folder(job)
    if read_job(folder).get("state") != "waiting":
        raise RefusedError(f"job {job} does not wait any more; stop its run instead")
    set_state(folder, {"state": "cancelled", "ended": time.time()})


def set_state(folder: Path, state: dict[str, Any]) -> None:
    _write(folder / "state.json", state)


def _write(file: Path, said: dict[str, Any]) -> None:
    replace_file(file, lambda path: path.write_text(json.dumps(said)))


def read_log(folder: Path) -> str:
    """The end of a job's log as a terminal shows it: of a progress bar the latest state."""
    try:
        with (folder / "log.txt").open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - LOG))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(lines[1:] if size > LOG else lines)


def error_in(folder: Path) -> str | None:
    """The last error that a job's log says."""
    found = re.findall(r"^error: (.+)$", read_log(folder), re.MULTILINE)
    return found[-1] if found else None
