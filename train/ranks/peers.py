"""Ranks that notice within seconds when one of them is gone.

A collective operation waits for all ranks, for hours if need be: rank 0 may encode a large data set. So the ranks also
keep connections to rank 0, which the system closes when a process dies in whatever way, and breaks within half a minute
when a machine does. Who loses the other says so in one paragraph and ends; the launcher's own view ends at its machine.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from accelerate.utils import gather_object

BYE, GONE = b"bye", b"gone "  # lines that are sent: this rank is done; that rank has died
LATER = (
    1.5  # seconds after which ranks speak that are not the first of their machine: by then it has, and they are gone
)


def _alive(connection: socket.socket) -> socket.socket:
    """Have the system ask the other machine whether it is there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _listen() -> socket.socket:
    with suppress(OSError):  # without IPv6
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _lines(connection: socket.socket) -> Iterator[bytes]:
    """What is sent, by the line, until the connection ends."""
    with suppress(OSError), connection.makefile("rb") as stream:
        for line in stream:
            yield line.strip()


class Watch:
    """This rank's connections, each read by a thread."""

    def __init__(self, rank: int, ranks: int, lost: Callable[[int, int], object]) -> None:
        """lost: called in a thread with the rank that died and the number of ranks."""
        self.rank, self.ranks, self.lost = rank, ranks, lost
        self.others: dict[int, socket.socket] = {}
        self.done: set[int] = set()
        self.leaving = False
        self.told = threading.Event()
        token = secrets.token_hex(16)
        server = _listen() if rank == 0 else None
        ((port, self.token),) = gather_object([(server.getsockname()[1], token)] if server else [])
        if server:
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        else:
            connection = _alive(socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), 10))
            connection.sendall(f"{self.token} {rank}\n".encode())
            self._read(0, connection, _lines(connection))

    def _accept(self, server: socket.socket) -> None:
        while True:
            connection = _alive(server.accept()[0])
            lines = _lines(connection)
            token, _, rank = next(lines, b"").decode(errors="replace").partition(" ")
            if token == self.token and rank.isdigit():
                self._read(int(rank), connection, lines)
            else:
                connection.close()

    def _read(self, other: int, connection: socket.socket, lines: Iterator[bytes]) -> None:
        self.others[other] = connection
        threading.Thread(target=self._follow, args=(other, lines), daemon=True).start()

    def _follow(self, other: int, lines: Iterator[bytes]) -> None:
        for line in lines:
            if line == BYE:
                self.done.add(other)
            elif line.startswith(GONE):
                self._lose(int(line.removeprefix(GONE)))
        if other not in self.done:
            self._lose(other)

    def _lose(self, rank: int) -> None:
        if self.leaving or self.told.is_set():
            return
        self.told.set()
        self._send(GONE + str(rank).encode())
        self.lost(rank, self.ranks)

    def _send(self, line: bytes) -> None:
        for connection in [*self.others.values()]:
            with suppress(OSError):  # it has ended too
                connection.sendall(line + b"\n")

    def leave(self, error: BaseException | None) -> None:
        """Part from the others, who go on undisturbed if there is no error."""
        if error is not None and not isinstance(error, ValueError | KeyboardInterrupt | SystemExit):
            self.told.wait(2)  # an operation fails too when another rank dies: that is what has to be said then
        self.leaving = True
        if error is None:
            self._send(BYE)


def end(rank: int, ranks: int) -> None:
    """Say which rank is gone, and end this process, whatever it waits for."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LATER)
    print(
        f"\nerror: rank {rank} of {ranks} has ended before the work was done, so the others end too. What it said "
        "itself stands above; if it said nothing, it was killed: look for out-of-memory in the system's log, or at its "
        "machine. The same command resumes at the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


@contextmanager
def watching(rank: int, ranks: int, say: Callable[[str], Any]) -> Iterator[None]:
    """Within, end this process soon after another rank has died."""
    if ranks == 1:
        yield
        return
    try:
        watch = Watch(rank, ranks, end)
    except OSError as error:
        say(f"note: rank {rank} cannot reach rank 0 ({error}): if one of them dies, the other waits for the launcher")
        yield
        return
    try:
        yield
    except BaseException as error:
        watch.leave(error)
        raise
    watch.leave(None)
