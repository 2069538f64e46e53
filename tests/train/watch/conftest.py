"""A page that is served from a folder with runs, in this process, as train/page.py serves it."""

import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from train.watch.app import make_app
from train.watch.serve import listen
from train.watch.settings import Page

TOKEN = "a-token-of-the-tests"
SECRET = "nobody-may-read-this"


@dataclass
class Served:
    """A page that is being served."""

    folder: Path
    """Its working folder, which holds runs/."""
    port: int
    cookie: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={TOKEN}"

    def raw(self, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of a request with these headers alone, Host included."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                for each in value.split("\n"):
                    connection.putheader(name, each)
            if body is not None and "Content-Length" not in headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @property
    def good(self) -> dict[str, str]:
        """The headers of the page's own requests."""
        host = f"127.0.0.1:{self.port}"
        return {"Host": host, "Origin": f"http://{host}", "Cookie": self.cookie, "Content-Type": "application/json"}

    def get(self, path: str) -> Any:
        status, body = self.raw("GET", path, self.good)
        assert status == 200, (status, body)
        return json.loads(body)

    def post(self, path: str, **form: Any) -> tuple[int, Any]:
        status, body = self.raw("POST", path, self.good, json.dumps(form).encode())
        return status, json.loads(body)


def serving(folder: Path, **options: Any) -> Iterator[Served]:
    """Serve from a folder, which is this process's working folder meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    guard = make_app(Page(0, open=False, **options), TOKEN)
    sock = listen(0)
    server = uvicorn.Server(uvicorn.Config(guard, log_level="error", access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(folder, sock.getsockname()[1], f"{guard.cookie}={TOKEN}")
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
        os.chdir(before)


def make_run(folder: Path, steps: int = 40, asked: int = 40, **settings: Any) -> Path:
    """A run's folder as a training leaves it, without its adapter."""
    (folder / "previews").mkdir(parents=True)
    lines = [{"step": 0, "validation_loss": 1.5, "validation_loss_by_level": [2.0, 1.0]}]
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "lr": 1e-4, "memory_gib": 0.5, "loss": 1 / step, "gradient_norm": 0.1, "seconds": 0.2}
        )
    lines.append({"step": steps, "validation_loss": 0.5, "validation_loss_by_level": [0.7, 0.3]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = f"run: {folder.name}\nsteps: {asked}\nmodel:\n  path: somewhere\nprecision:\n  kind: nf4\n"
    for name, value in settings.items():
        text += f"{name}: {json.dumps(value)}\n"
    (folder / "config.yaml").write_text(text)
    for step in (steps // 2, steps):
        Image.new("RGB", (64, 64), (step % 256, 90, 120)).save(folder / "previews" / f"step-{step:06d}.png")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page over two runs, a data folder within runs/ and one outside, with secrets all around."""
    folder = tmp_path_factory.mktemp("home")
    runs = folder / "runs"
    make_run(runs / "mine", seed=1)
    make_run(runs / "other", seed=2)
    (folder / "secret.txt").write_text(SECRET)
    (folder / "secret.png").write_bytes(SECRET.encode())
    (runs / "mine" / "secret.json").write_text(SECRET)
    (runs / "mine" / "leak.png").symlink_to(folder / "secret.png")
    (runs / "leak").symlink_to(folder)
    (runs / "cache").mkdir()
    (runs / "cache" / "secret.png").write_bytes(SECRET.encode())
    (runs / ".page").mkdir()
    (runs / ".page" / "secret.png").write_bytes(SECRET.encode())
    for data in (runs / "set", folder / "named", folder / "hidden"):
        data.mkdir()
        Image.new("RGB", (80, 60), "red").save(data / "a.png")
        (data / "a.txt").write_text(SECRET if data.name == "hidden" else "a red card")
    (runs / "set" / "link.png").symlink_to(folder / "hidden" / "a.png")
    yield from serving(folder, folders=[str(folder / "named")])
