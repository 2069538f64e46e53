"""The drawing process: takes one request after another, and keeps the model of the last one.

It leaves when a training begins, when it was not asked for anything for a while, or at SIGTERM. Where a training runs
already it draws beside it, as it was asked to, and leaves then.
"""

import json
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any

from infer.choosing.draw import draw_choice
from infer.choosing.settings import Choose, check_choose
from infer.device.device import describe_device
from infer.drawing.draw import draw_pictures
from infer.drawing.loaded import Held, free
from infer.drawing.settings import Draw, check_draw
from infer.program.errors import reason
from infer.report.results import from_json
from infer.resident.settings import SOCKET, Serve
from infer.resident.state import write_state
from infer.resident.turns import TRAINING, drawing_turn, is_held

LOOK = 0.5  # seconds between two looks at what may end it
LARGEST = 2**20  # bytes of a request


class WithdrawnError(Exception):
    """Who asked is gone."""


class Told:
    """A stream that goes to who asked."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection, self.name = connection, name

    def write(self, text: str) -> int:
        send(self.connection, {self.name: text})
        return len(text)

    def flush(self) -> None:
        """Every text is sent at once."""


def send(connection: socket.socket, said: dict[str, Any]) -> None:
    try:
        connection.sendall((json.dumps(said) + "\n").encode())
    except OSError as error:
        raise WithdrawnError from error


def serve(options: Serve) -> None:
    """Take requests until there is a reason to leave.

    Raises:
        ValueError: another drawing process runs in this folder.
    """
    asked_to_end: list[int] = []
    with drawing_turn():

        def note(number: int, frame: object) -> None:
            asked_to_end.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        SOCKET.unlink(missing_ok=True)  # of one that was killed
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(SOCKET))
            listening.listen(16)
            why = _take_requests(listening, options, asked_to_end)
        finally:
            listening.close()
            SOCKET.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
        write_state("ended", reason=why)
    print(f"ended: {why}")


def _take_requests(listening: socket.socket, options: Serve, asked_to_end: list[int]) -> str:
    """Returns why it leaves."""
    held, served, last = Held(stays=True), 0, time.monotonic()
    beside = is_held(TRAINING)  # it was started although one trains
    write_state("waiting", idle=options.idle)
    while True:
        if asked_to_end:
            return "it was asked to end"
        if (served or not beside) and is_held(TRAINING):
            return "a training has begun"
        if time.monotonic() - last > options.idle:
            return f"nothing was asked for within {options.idle:g} s"
        if not select.select([listening], [], [], LOOK)[0]:
            continue
        connection, _ = listening.accept()
        with connection:
            failed = _answer(connection, held, options, asked_to_end)
        if failed:
            return f"after a defect: {failed}"
        served, last = served + 1, time.monotonic()


def _facts(held: Held) -> dict[str, Any]:
    """What is loaded."""
    loaded = held.loaded
    if loaded is None:
        return {"model": None}
    facts: dict[str, Any] = {"model": f"{loaded.model.path}, {loaded.precision.kind}"}
    facts["device"] = describe_device(loaded.device)
    if loaded.device.type == "cuda":
        import torch

        facts["bytes"] = torch.cuda.memory_reserved(loaded.device)
    return facts


def _answer(connection: socket.socket, held: Held, options: Serve, asked_to_end: list[int]) -> str | None:
    """Do what one request asks for; returns the defect after which this process should not go on."""
    beside = is_held(TRAINING)  # it was asked for although one trains

    def between() -> None:
        if asked_to_end:
            raise ValueError("the drawing process was asked to end; what was drawn before is written")
        if not beside and is_held(TRAINING):
            raise ValueError(
                "a training has begun and has the GPU now; what was drawn before is written. Draw the rest when it has "
                "ended, or now beside it with the same command once more"
            )
        if select.select([connection], [], [], 0)[0]:  # it has sent all that it sends: its end
            raise WithdrawnError

    held.between = between
    defect: str | None = None
    said: str | None = None
    try:
        work = _read(connection)
        write_state("drawing", **_facts(held))
        with redirect_stdout(Told(connection, "out")), redirect_stderr(Told(connection, "err")):
            work(held)
    except WithdrawnError:
        free(held)
    except Exception as error:
        free(held)  # whatever was half done
        said = reason(error)
        if said is None:
            traceback.print_exc(file=sys.__stderr__)
            defect = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            said = f"a defect of flux-lora, not of yours, in the drawing process: {defect}; its log has the traceback"
    write_state("waiting", idle=options.idle, **_facts(held))
    with suppress(WithdrawnError):  # it is gone, and needs no answer
        send(connection, {"error": said})
    return defect


def _read(connection: socket.socket) -> Callable[[Held], object]:
    """What a request asks for.

    Raises:
        ValueError: it is none, or something that it names is absent.
        WithdrawnError: it ends before it is whole.
    """
    content = b""
    connection.settimeout(10)
    while not content.endswith(b"\n"):
        try:
            part = connection.recv(2**16)
        except OSError as error:
            raise WithdrawnError from error
        if not part or len(content) > LARGEST:
            raise WithdrawnError
        content += part
    connection.settimeout(None)
    said = json.loads(content)
    send(connection, {"taken": True})
    if said["what"] == "draw":
        drawing = from_json(Draw, said["options"], "")
        device = check_draw(drawing)
        return lambda held: draw_pictures(drawing, device, held)
    choosing = from_json(Choose, said["options"], "")
    files, device = check_choose(choosing)
    return lambda held: draw_choice(choosing, files, device, held)
