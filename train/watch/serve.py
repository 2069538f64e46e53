"""Binds the port, prints the address, and serves until a signal."""

import errno
import secrets
import socket
import threading
import webbrowser

import uvicorn

from train.watch.app import make_app
from train.watch.settings import Page


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1.

    Raises:
        ValueError: the port is taken or not ours to take.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        what = "is taken, perhaps by another page" if error.errno == errno.EADDRINUSE else "is not for users"
        raise ValueError(f"port {port} {what}; choose another one, such as port={max(port, 1024) + 1}, or 0") from error
    return sock


def serve(options: Page) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    sock, token = listen(options.port), secrets.token_urlsafe(24)
    address = f"http://127.0.0.1:{sock.getsockname()[1]}/?token={token}"
    config = uvicorn.Config(
        make_app(options, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    print(f"page: {address}\n(Ctrl-C closes it; what it started goes on)", flush=True)
    if options.open:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    uvicorn.Server(config).run([sock])
