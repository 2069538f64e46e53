"""The other side of the drawing process: starts one if there is none, asks it, and prints what it says. No torch.

A request is a line of JSON, {"what": "draw", "options": {...}}, to a socket in a folder that this user alone can read.
The answer is lines of JSON: {"taken": true}, {"out": text} or {"err": text} as they come, and {"error": text or null}
at the end.
"""

import json
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from infer.program.errors import MEND
from infer.program.paths import ROOT
from infer.resident.settings import LOG, SOCKET

STARTING = 300.0  # seconds that a process may take to import torch on a busy machine


def ask(what: str, options: Any) -> None:
    """Have the drawing process do what a command's settings ask for.

    Raises:
        ValueError: what it says is wrong, or it has died meanwhile.
    """
    for _ in range(2):
        connection = _connect() or _start()
        with connection, connection.makefile("r", encoding="utf-8", newline="\n") as answers:
            with suppress(ConnectionError):  # it has just ended: its answer is empty
                connection.sendall((json.dumps({"what": what, "options": asdict(options)}) + "\n").encode())
            if not select.select([connection], [], [], 2)[0]:
                print("waits for what the drawing process does before this", flush=True)
            taken = _print_all(answers)
        if taken:
            return
    raise ValueError("the drawing process ended before it took the request, twice; give the command once more")


def _print_all(answers: Any) -> bool:
    """Print what comes until the end; False if the process ended before it took the request.

    Raises:
        ValueError: what is wrong.
    """
    taken = False
    while True:
        try:
            line = answers.readline()
        except ConnectionError:
            line = ""
        if not line:
            break
        said = json.loads(line)
        if "error" in said:
            if said["error"] is not None:
                raise ValueError(said["error"])
            return True
        taken = True
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            if name in said:
                stream.write(said[name])
                stream.flush()
    if taken:
        raise ValueError(
            f"the drawing process died: it was killed, or memory ran out ({LOG} has its last words). What it had drawn "
            "is written; the same command starts another one, or draws by itself with resident=false"
        )
    return False


def _connect() -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(SOCKET))
    except OSError:  # nobody is there: no file, or one that a killed process left
        connection.close()
        return None
    return connection


def _start() -> socket.socket:
    """Start a drawing process, which outlives this one, and connect to it.

    Raises:
        ValueError: it does not come up.
    """
    LOG.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    print("a drawing process starts, which keeps the model for the next pictures", flush=True)
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "infer" / "serve.py")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        if (connection := _connect()) is not None:
            return connection
        code = process.poll()
        if code == MEND:  # another command's process was faster
            end = min(end, time.monotonic() + 10)
        elif code is not None:
            break
        time.sleep(0.05)
    raise ValueError(f"the drawing process did not start; {LOG} says why. resident=false draws without it")
