"""What others ask of a run that goes on: a file in runs/<run>/requests/ named `save`, `sample` or `stop`.

    mkdir -p runs/mine/requests && touch runs/mine/requests/sample

A thread looks into that folder once a second and takes the files away, so a step costs nothing more; `stop` becomes the
SIGTERM that a terminal would send, which works before the loop begins too. A file that reached the folder while nobody
trained is old: it is removed when the run starts.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.state.signals import StopSignals

FOLDER = "requests"
KINDS = ("save", "sample", "stop")
EVERY = 1.0  # seconds between two looks


class Requests:
    """What was asked for and not done yet."""

    def __init__(self, folder: Path, stop: StopSignals) -> None:
        self.folder, self.stop = folder / FOLDER, stop
        self.asked: set[str] = set()
        self.ended = threading.Event()
        self.take()
        self.asked.clear()

    def take(self) -> None:
        """Move what the folder holds into `asked`."""
        for kind in KINDS:
            try:
                (self.folder / kind).unlink()
            except OSError:  # it is not there, or the folder was deleted meanwhile
                continue
            self.asked.add(kind)

    def watch(self) -> None:
        """Look again and again until the run ends."""
        while not self.ended.wait(EVERY):
            self.take()
            if self.pop("stop") and self.stop.reason is None:  # a second signal would end it at once
                os.kill(os.getpid(), signal.SIGTERM)

    def pop(self, kind: str) -> bool:
        """Whether this was asked for since the last call."""
        if kind not in self.asked:  # what the thread adds after this is found by the next call
            return False
        self.asked.discard(kind)
        return True


@contextmanager
def heard(folder: Path, stop: StopSignals) -> Iterator[Requests]:
    """Within, requests in the run's folder are heard. Call on the main rank, with the run locked."""
    requests = Requests(folder, stop)
    thread = threading.Thread(target=requests.watch, name="requests", daemon=True)
    thread.start()
    try:
        yield requests
    finally:
        requests.ended.set()
        thread.join()


def ask(folder: Path, kind: str) -> None:
    """Ask a run for something.

    Raises:
        ValueError: nothing of that kind can be asked for.
    """
    if kind not in KINDS:
        raise ValueError(f"a run is asked for {kind!r}; ask for one of {', '.join(KINDS)}")
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / kind).touch()
