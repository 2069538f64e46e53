"""Requests that the page must refuse: none of them may read what lies outside, write anything, or start anything."""

import json
import socket
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from infer.program.literal import kind_of, required
from infer.program.settings import settings
from tests.train.watch.conftest import SECRET, TOKEN, Served
from train.run.config import Train
from train.watch.actions import ACTIONS
from train.watch.commands import FORBIDDEN
from train.watch.guard import host_of

READS = [
    "/",
    "/api/runs",
    "/api/run?name=mine",
    "/api/form",
    "/files/mine/previews/step-000040.png",
    "/static/watch.js",
]


def state(folder: Path) -> list[tuple[str, int]]:
    """Every file that there is, with its size."""
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def unchanged(served: Served) -> Any:
    """No hostile request may change a file, and the page still answers afterwards."""
    before = state(served.folder)
    yield
    assert state(served.folder) == before
    assert [run["name"] for run in served.get("/api/runs")["runs"]] in (["mine", "other"], ["other", "mine"])


def refused(served: Served, method: str, path: str, changes: dict[str, str | None], body: bytes | None = None) -> bytes:
    """Send the page's own headers with some changed or left out; the answer must be a refusal without the secret."""
    headers = {name: value for name, value in (served.good | changes).items() if value is not None}
    status, answer = served.raw(method, path, headers, body)
    assert 400 <= status < 500, (status, answer[:200])
    assert SECRET.encode() not in answer
    return answer


# who asks: 30

HOSTS = [
    "evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost.evil.example",
    "127.0.0.2:{port}", "0.0.0.0:{port}", "[::]:{port}", "", ":{port}", "127.0.0.1:{port}\nevil.example",
    "127.0.0.1:port", "127.0.0.1:99999",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_another_host(served: Served, host: str) -> None:
    refused(served, "GET", "/api/runs", {"Host": host.format(port=served.port)})


@pytest.mark.parametrize("path", READS)
def test_no_token(served: Served, path: str) -> None:
    refused(served, "GET", path, {"Cookie": None})


COOKIES = ["{name}=", "{name}=wrong", "{name}={token}x", "other={token}", "{name}=\xff", "a=b; c", '{name}="{token']


@pytest.mark.parametrize("cookie", COOKIES)
def test_a_wrong_token(served: Served, cookie: str) -> None:
    name = served.cookie.partition("=")[0]
    refused(served, "GET", "/api/runs", {"Cookie": cookie.replace("{name}", name).replace("{token}", TOKEN)})


def test_cookies_of_other_programs_on_this_machine(served: Served) -> None:
    headers = served.good | {"Cookie": f'theirs={{"a": [1, 2]}}; {served.cookie}; more="'}
    assert served.raw("GET", "/api/runs", headers)[0] == 200


@pytest.mark.parametrize("query", ["?token=", "?token=wrong", f"?token={TOKEN}&token={TOKEN}", f"?TOKEN={TOKEN}"])
def test_a_wrong_token_in_the_address(served: Served, query: str) -> None:
    refused(served, "GET", f"/{query}", {"Cookie": None})
    refused(served, "GET", f"/api/runs{query}&token={TOKEN}", {"Cookie": None})


FOREIGN: list[dict[str, str | None]] = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "https://127.0.0.1:{port}"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost:{port}"},  # the page was asked for under another name
    {"Origin": "http://127.0.0.1:{port}\nhttp://evil.example"},
    {"Origin": None},
    {"Origin": None, "Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # another server on this machine
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": None},
    {"Content-Length": "1048577"},
    {"Content-Length": None, "Transfer-Encoding": "chunked"},
    {"Cookie": None},
]


@pytest.mark.parametrize("changes", FOREIGN, ids=str)
def test_another_site_changes_nothing(served: Served, changes: dict[str, str | None]) -> None:
    own = {name: value and value.format(port=served.port) for name, value in changes.items()}
    body = json.dumps({"run": "mine", "do": "stop"}).encode()
    if "Content-Length" in own:
        body = b"0\r\n\r\n" if own["Content-Length"] is None else b""
    refused(served, "POST", "/api/steer", own, body)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_another_method(served: Served, method: str) -> None:
    refused(served, method, "/api/runs", {})


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_a_link_does_nothing(served: Served, action: str) -> None:
    refused(served, "GET", f"/api/{action}?run=mine&do=stop", {})


# what is read: 40

PATHS = [
    "/files/../secret.png", "/files/%2e%2e/secret.png", "/files/..%2fsecret.png", "/files/mine/../../secret.png",
    "/files/mine/%2e%2e/%2e%2e/secret.png", "/files//etc/passwd", "/files/%2fetc%2fpasswd", "/files/mine/leak.png",
    "/files/leak/secret.png", "/files/mine/secret.json", "/files/mine/config.yaml", "/files/mine/.lock",
    "/files/.page/secret.png", "/files/cache/secret.png", "/files/mine/..\\..\\secret.png", "/files/mine/%00.png",
    "/files/mine/previews/step-000040.png%00.html", "/files/mine/previews", "/files/", "/files/mine/a%0d%0aX: y.png",
    "/files/" + "a/" * 2000 + "x.png", "/files/" + "é" * 300 + ".png", "/files/~/secret.png", "/files/mine/./leak.png",
    "/static/../settings.py", "/static/%2e%2e%2fsettings.py", "/static/..", "/static/%2fetc%2fpasswd", "/static/x.py",
    "/api/run?name=../mine", "/api/run?name=/etc", "/api/run?name=leak", "/api/run?name=.page", "/api/run?name=",
    "/api/run?name=mine&name=other", "/api/run", "/api/run?name=cache", "/api/run?name=mine/previews",
    "/api/curves?name=..", "/api/losses?name=%00", "/api/diff?name=mine&other=../mine", "/api/job?id=../../secret",
    "/api/job?id=20260101-000000-000000", "/api/job?id=.", "/api/record?name=mine/drawn/../../secret.png",
    "/api/record?name=../drawn/x.png", "/api/record?name=mine/drawn/leak.png",
    "/api/data?folder=/etc", "/api/data?folder=..", "/api/data?folder=hidden", "/api/data?folder={home}/hidden",
    "/api/data?folder=runs/mine", "/api/data?folder=runs", "/api/data?folder=runs/leak/hidden", "/api/data?folder=",
    "/picture?folder=runs/set&name=../../hidden/a.png", "/picture?folder=runs/set&name=link.png",
    "/picture?folder={home}/hidden&name=a.png", "/picture?folder=runs/set&name=/etc/passwd", "/picture?folder=runs/set",
    "/picture?folder=runs/set&name=a.txt", "/api/story?name=../mine", "/api/story?name=leak",
    "/api/survey?folder=hidden", "/api/survey?folder=../x", "/api/survey",
    "/crop?folder={home}/hidden&name=a.png&view=64,48,0,0,80,60,0",
    "/crop?folder=runs/set&name=link.png&view=64,48,0,0,80,60,0",
    "/crop?folder=runs/set&name=../../hidden/a.png&view=64,48,0,0,80,60,0", "/crop?folder=runs/set&name=a.png&view=x",
    "/crop?folder=runs/set&name=a.png&view=64,48,0,0,800,60,0",
    "/crop?folder=runs/set&name=a.png&view=64,48,nan,0,80,60,0",
    "/crop?folder=runs/set&name=a.png&view=99999999,48,0,0,80,60,0", "/docs", "/openapi.json", "/api/nothing",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_way_out_of_the_folders(served: Served, path: str) -> None:
    refused(served, "GET", quote(path.format(home=served.folder), safe="/?&=%~.\\"), {})


# what is started: 40

TRAIN: dict[str, Any] = {"what": "train", "run": "new", "model": "tiny", "data": "runs/set"}
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("start", TRAIN | {"more": "hydra.run.dir=/tmp/x"}),
    ("start", TRAIN | {"more": "hydra/launcher=submitit"}),
    ("start", TRAIN | {"more": "+hydra.callbacks.x._target_=os.system"}),
    ("start", TRAIN | {"more": "sweep.launch=[sh,-c,id]"}),
    ("start", TRAIN | {"more": "sweep=all_gpus"}),
    ("start", TRAIN | {"more": "--config-dir=/tmp"}),
    ("start", TRAIN | {"more": "-m"}),
    ("start", TRAIN | {"more": "~data"}),
    ("start", TRAIN | {"more": "+x=1"}),
    ("start", TRAIN | {"more": "push=me/mine"}),
    ("start", TRAIN | {"more": "track=wandb"}),
    ("start", TRAIN | {"more": "mirror=s3://mine/runs"}),
    ("start", TRAIN | {"more": "sampling.model=/etc"}),
    ("start", TRAIN | {"more": "data.cache=/tmp/elsewhere"}),
    ("start", TRAIN | {"more": "data={path:/etc}"}),
    ("start", TRAIN | {"more": "data.path=/etc"}),
    ("start", TRAIN | {"more": "data.sources=[{path:/etc}]"}),
    ("start", TRAIN | {"more": "data.prior={path:/etc}"}),
    ("start", TRAIN | {"more": "data.masks=/etc"}),
    ("start", TRAIN | {"more": "adapter.start=/etc/passwd"}),
    ("start", TRAIN | {"more": "adapter={start:/etc/passwd}"}),
    ("start", TRAIN | {"more": "model.path=/etc"}),
    ("start", TRAIN | {"more": "previews=@/etc/passwd"}),
    ("start", TRAIN | {"more": "data.prefix=${oc.env:HOME}"}),
    ("start", TRAIN | {"more": "optim.lr=1e-4\nhydra.job.chdir=true"}),
    ("start", TRAIN | {"more": "no setting"}),
    ("start", TRAIN | {"more": "optim=../../secret"}),
    ("start", TRAIN | {"more": "steps=10**9"}),
    ("start", TRAIN | {"more": ["steps=1"]}),
    ("start", TRAIN | {"run": "../out"}),
    ("start", TRAIN | {"run": "/tmp/out"}),
    ("start", TRAIN | {"run": ".page"}),
    ("start", TRAIN | {"run": "a\nb"}),
    ("start", TRAIN | {"run": "cache"}),
    ("start", TRAIN | {"run": {"a": 1}}),
    ("start", TRAIN | {"model": "../tiny"}),
    ("start", TRAIN | {"model": "tiny steps=1"}),
    ("start", TRAIN | {"preset": "demo hydra.run.dir=x"}),
    ("start", TRAIN | {"data": "/etc"}),
    ("start", TRAIN | {"data": "hidden"}),
    ("start", TRAIN | {"steps": "1e3; rm -rf /"}),
    ("start", TRAIN | {"steps": "٣"}),
    ("start", TRAIN | {"trigger": "${oc.env:HOME}"}),
    ("start", TRAIN | {"kind": "evil"}),
    ("start", TRAIN | {"when": "later"}),
    ("start", {"what": "rm -rf", "run": "mine"}),
    ("start", {"what": "go on", "run": "mine"}),
    ("start", {"what": "draw", "run": "mine", "adapter": "../../secret", "prompts": "x"}),
    ("start", {"what": "draw", "run": "mine", "adapter": "base", "prompts": ""}),
    ("start", {"what": "draw", "run": "mine", "adapter": "base", "prompts": "x", "seeds": "0; id"}),
    ("start", {"what": "draw", "run": "mine", "adapter": "base", "prompts": "x", "steps": "nan"}),
    ("start", {"what": "draw", "run": "leak", "adapter": "base", "prompts": "x"}),
    ("start", {"what": "choose", "run": "mine", "take": "../x"}),
    ("start", {"what": "choose", "run": "mine", "checkpoints": "7"}),
    ("start", {"what": "choose", "run": "mine", "average": "maybe"}),
    ("start", {"what": "choose", "run": "mine", "networks": "../../x"}),
    ("start", {"what": "survey", "folder": "hidden"}),
    ("start", {"what": "survey", "folder": "/etc"}),
    ("start", {"what": "survey", "folder": "runs/set", "resolution": "512 run=../x"}),
    ("start", {"what": "survey", "folder": "runs/set", "model": "/etc"}),
    ("start", {"what": "survey", "folder": "runs/set", "trigger": "${oc.env:HOME}"}),
    ("giveback", {}),
    ("steer", {"run": "mine", "do": "stop"}),
    ("steer", {"run": "mine", "do": "../../x"}),
    ("steer", {"run": "../mine", "do": "stop"}),
    ("cancel", {"job": "../../mine"}),
    ("cancel", {"job": ["x"]}),
    ("caption", {"folder": "hidden", "name": "a.png", "was": [SECRET], "captions": ["x"]}),
    ("caption", {"folder": "runs/set", "name": "../../hidden/a.png", "was": [SECRET], "captions": ["x"]}),
    ("caption", {"folder": "runs/set", "name": "link.png", "was": [], "captions": ["x"]}),
    ("caption", {"folder": "runs/set", "name": "a.png", "was": ["another"], "captions": ["x"]}),
    ("caption", {"folder": "runs/set", "name": "a.png", "was": ["a red card"], "captions": [""]}),
    ("caption", {"folder": "runs/set", "name": "a.png", "was": ["a red card"], "captions": "x"}),
    ("caption", {"folder": "runs/set", "name": "a.txt", "was": [], "captions": ["x"]}),
    ("undo", {"folder": "runs/set"}),
    ("undo", {"folder": "hidden"}),
]  # fmt: skip


@pytest.mark.parametrize(("action", "form"), FORMS, ids=[f"{i}" for i in range(len(FORMS))])
def test_nothing_hostile_is_started_or_written(served: Served, action: str, form: dict[str, Any]) -> None:
    answer = refused(served, "POST", f"/api/{action}", {}, json.dumps(form).encode())
    assert json.loads(answer)["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b"{", b'{"run": "\xff"}', b"[" * 100_000, b'{"a":' * 5_000])
def test_what_is_no_form(served: Served, body: bytes) -> None:
    refused(served, "POST", "/api/start", {}, body)


@pytest.mark.parametrize(
    "sent", [b"GARBAGE\r\n\r\n", b"GET /\r\n\r\n", b"\x16\x03\x01" + b"\x00" * 200, b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_request(served: Served, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as stream:
        stream.sendall(sent)
        assert not stream.recv(4096).startswith(b"HTTP/1.1 2")


def test_recorded_words_that_run_code_are_for_a_terminal(served: Served) -> None:
    file = served.folder / "runs" / "mine" / "latest.json"
    for word in ("hydra.run.dir=x", "--config-dir=/tmp", "+hydra.callbacks.a._target_=os.system", "sweep.launch=[sh]",
                 "data.prefix=${oc.env:HOME}", "push=a/b", "-m"):  # fmt: skip
        file.write_text(json.dumps({"words": ["steps=1", word], "ranks": 1}))
        refused(served, "POST", "/api/start", {}, json.dumps({"what": "go on", "run": "mine"}).encode())
    file.unlink()


TEXTS = {
    "precision.kind", "precision.compute_dtype", "precision.products", "precision.skip_modules", "precision.layers",
    "precision.t5", "adapter.init", "adapter.kind", "adapter.targets", "data.resolution", "data.trigger",
    "data.image_column",
    "data.caption_column", "data.prior.prompt", "data.background", "data.prefix", "data.suffix", "data.on_error",
    "flow.loss", "flow.loss_schedule",
    "flow.density", "flow.weighting", "memory.keep", "optim.name", "optim.schedule", "preserve.kind", "preserve.word",
    "previews", "unrelated",
}  # fmt: skip
"""Settings of train.py that hold text and may be set from the page: no path, no program, no address."""


def test_every_setting_that_holds_text_was_thought_of() -> None:
    """A new one must be put into TEXTS or, if it names a path, a program or an address, into FORBIDDEN."""
    open_texts = set()
    for name in settings(Train):
        kind = required(kind_of(Train, name))[0]
        forbidden = any(name == each or name.startswith(f"{each}.") for each in FORBIDDEN)
        if not forbidden and not is_dataclass(kind) and kind not in (int, float, bool):
            open_texts.add(name)
    assert open_texts == TEXTS


def test_the_page_lets_itself_in(served: Served) -> None:
    """What a browser sends passes, so that the refusals above have their reasons."""
    host = f"127.0.0.1:{served.port}"
    status, _ = served.raw("GET", f"/?token={TOKEN}", {"Host": host})
    assert status == 303
    assert served.raw("GET", "/", served.good)[0] == 200
    assert served.raw("GET", "/files/mine/previews/step-000040.png", served.good)[0] == 200
    status, said = served.post("/api/command", **TRAIN)
    assert status == 200 and said["command"] == "python train/train.py model=tiny run=new data.path=runs/set"
    assert (
        served.raw("GET", "/api/runs", served.good | {"Host": "localhost:9"} | {"Origin": "http://localhost:9"})[0]
        == 200
    )
    assert (host_of("[::1]:80"), host_of("LOCALHOST"), host_of("a:b")) == ("[::1]", "localhost", None)
