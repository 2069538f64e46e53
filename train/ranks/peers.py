"""Ranks that notice within seconds when one of them has died.

A collective operation waits for all ranks, if need be for hours: rank 0 may encode a large data set. So each rank also
keeps a connection to rank 0. The system closes it at once when a process dies in any way, and within half a minute when
a machine does. A rank that loses its connection ends, and one of each machine says so in a paragraph. A launcher sees
one machine only.

torch's TCPStore does not replace the connections: its server tells nobody that a client has died, so every rank would
have to write a heartbeat, and a thread of Python is late by as long as a library holds the interpreter (23 s while
json reads 123 MiB on a busy machine). A limit long enough for that is no longer within seconds.
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

FINISHED, DIED = b"bye", b"gone "  # lines that are sent: this rank has finished; the rank with this number has died
# Seconds that a rank waits before it ends unless it is the one of its machine that speaks: that one has spoken by then.
# If it has died too, nobody speaks
OTHERS_WAIT = 1.5


def _with_keepalive(connection: socket.socket) -> socket.socket:
    """Have the system check that the other machine is still there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _listen() -> socket.socket:
    with suppress(OSError):  # this machine has no IPv6
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _lines(connection: socket.socket) -> Iterator[bytes]:
    """The lines that are received, until the connection ends."""
    with suppress(OSError), connection.makefile("rb") as received:
        for line in received:
            yield line.strip()


class PeerWatch:
    """This rank's connections to other ranks. A thread reads each."""

    def __init__(self, rank: int, ranks: int, on_death: Callable[[int, int], object]) -> None:
        """on_death: called in a thread, with the rank that died and the number of ranks."""
        self.rank, self.ranks, self.on_death = rank, ranks, on_death
        self.connections: dict[int, socket.socket] = {}
        self.finished: set[int] = set()
        self.leaving = False
        self.reported = threading.Event()
        token = secrets.token_hex(16)
        server = _listen() if rank == 0 else None
        ((port, self.token),) = gather_object([(server.getsockname()[1], token)] if server else [])
        if server:
            threading.Thread(target=self._accept_connections, args=(server,), daemon=True).start()
        else:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1"), port
            connection = _with_keepalive(socket.create_connection(address, 10))
            connection.sendall(f"{self.token} {rank}\n".encode())
            self._add(0, connection, _lines(connection))

    def _accept_connections(self, server: socket.socket) -> None:
        while True:
            connection = _with_keepalive(server.accept()[0])
            lines = _lines(connection)
            token, _, rank = next(lines, b"").decode(errors="replace").partition(" ")
            if token == self.token and rank.isdigit():
                self._add(int(rank), connection, lines)
            else:
                connection.close()

    def _add(self, other: int, connection: socket.socket, lines: Iterator[bytes]) -> None:
        self.connections[other] = connection
        threading.Thread(target=self._read_lines, args=(other, lines), daemon=True).start()

    def _read_lines(self, other: int, lines: Iterator[bytes]) -> None:
        for line in lines:
            if line == FINISHED:
                self.finished.add(other)
            elif line.startswith(DIED):
                self._report_death(int(line.removeprefix(DIED)))
        if other not in self.finished:
            self._report_death(other)

    def _report_death(self, rank: int) -> None:
        if self.leaving or self.reported.is_set():
            return
        self.reported.set()
        self._send(DIED + str(rank).encode())
        self.on_death(rank, self.ranks)

    def _send(self, line: bytes) -> None:
        for connection in [*self.connections.values()]:
            with suppress(OSError):  # this one has ended too
                connection.sendall(line + b"\n")

    def leave(self, error: BaseException | None) -> None:
        """Stop watching. Without an error the other ranks go on undisturbed."""
        if error is not None and not isinstance(error, ValueError | KeyboardInterrupt | SystemExit):
            self.reported.wait(2)  # if another rank has died, that made the operation fail: it is said instead
        self.leaving = True
        if error is None:
            self._send(FINISHED)


def exit_process(rank: int, ranks: int) -> None:
    """End this process, whatever it waits for; one of each machine says which rank has died."""
    local, own = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "RANK"))
    if local != speaker(rank, own - local):
        time.sleep(OTHERS_WAIT)  # where the launcher sees that one has ended, it ends the others
        os._exit(1)
    print(
        f"\nerror: rank {rank} of {ranks} has ended before the work was done, so the others end too. What it said "
        "itself stands above; if it said nothing, it was killed: look for out-of-memory in the system's log, or at its "
        "machine. The same command resumes at the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def speaker(died: int, first: int) -> int:
    """The local rank that says on its machine that a rank has died: the first, or the second if it was the first.

    first: the rank of the machine's first process.
    """
    return 1 if died == first else 0


@contextmanager
def watch_peers(rank: int, ranks: int, say: Callable[[str], Any]) -> Iterator[None]:
    """In the with-block, end this process within seconds of another rank's death."""
    if ranks == 1:
        yield
        return
    try:
        watch = PeerWatch(rank, ranks, exit_process)
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
