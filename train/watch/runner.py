"""Works off the page's queue, one command after another: `python -m train.watch.runner`; with a job's id only that.

One process of a machine holds the queue. It ends when nothing waits any more.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from infer.program.errors import DONE, STOPPED
from train.watch.jobs import argv, error_in, job_folder, jobs_folder, list_jobs, read_job, set_state


@contextmanager
def _held(file: Path) -> Iterator[bool]:
    """Whether this process holds the queue."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def work_off() -> None:
    """Run what waits until nothing does."""
    lock = jobs_folder().parent / "runner.lock"
    while next_job() is not None:
        with _held(lock) as mine:
            if not mine:
                return  # who holds it looks again after it has let go
            while (job := next_job()) is not None:
                run_job(job)


def next_job() -> Path | None:
    """The oldest job that waits in the queue."""
    waiting = [each for each in list_jobs(10**6) if each.get("queued") and each.get("state") == "waiting"]
    return job_folder(waiting[-1]["id"]) if waiting else None


def run_job(folder: Path) -> None:
    """Run one command to its end, with its log."""
    job = read_job(folder)
    me = psutil.Process()
    began = {"began": time.time(), "runner": me.pid, "runner_started": me.create_time()}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("ab") as log:
        try:
            process = subprocess.Popen(
                argv(job["words"]), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            started = psutil.Process(process.pid).create_time()
        except (OSError, psutil.Error) as error:
            set_state(folder, began | {"state": "failed", "reason": str(error), "ended": time.time()})
            return
        set_state(folder, began | {"state": "running", "pid": process.pid, "started": started})
        code = process.wait()
    state = {DONE: "done", STOPPED: "stopped"}.get(code, "failed")
    why = None
    if state == "failed":
        why = error_in(folder) or (f"ended by signal {-code}" if code < 0 else f"exit code {code}")
    set_state(folder, began | {"state": state, "code": code, "reason": why, "ended": time.time()})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_job(job_folder(sys.argv[1]))
    else:
        work_off()
