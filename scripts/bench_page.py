"""What the page costs: 1,000 runs listed, 100,000 steps drawn, processor time while nothing happens, and a training's
steps while it is watched.

    python scripts/bench_page.py                    # about half a minute
    python scripts/bench_page.py --train 2          # also a training of the bundled model, watched and not, twice each

It serves made runs by train/page.py as a person starts it, asks for what a browser asks for, and prints a row for each
figure; the last line is one JSON object. The limits beside the figures are those that the page was built for.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.paths import ROOT

STEP = '{"step": %d, "lr": 0.0001, "memory_gib": 6.5, "loss": %r, "gradient_norm": 0.25, "seconds": 0.4}\n'
TRAINED = [
    "experiment=demo", "steps=60", "validate_every=30", "save_every=0", "save_minutes=0", "preview_every=0",
    "previews=[]", "data.batch_size=2",
]  # fmt: skip


class Client:
    """What a browser asks for, with the token's cookie."""

    def __init__(self, address: str) -> None:
        self.host, _, token = address.removeprefix("http://").partition("/?token=")
        self.cookie = self._ask(f"/?token={token}", {})[0].getheader("set-cookie", "").partition(";")[0]

    def _ask(
        self, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def get(self, path: str) -> tuple[float, Any]:
        """The seconds that an answer takes, and the answer."""
        began = time.perf_counter()
        answer, body = self._ask(path, {"Cookie": self.cookie})
        took = time.perf_counter() - began
        assert answer.status == 200, (answer.status, body[:300])
        return took, json.loads(body)

    def post(self, action: str, form: dict[str, Any]) -> Any:
        """The answer to a form."""
        headers = {"Cookie": self.cookie, "Origin": f"http://{self.host}", "Content-Type": "application/json"}
        answer, body = self._ask(f"/api/{action}", headers, json.dumps(form).encode())
        assert answer.status == 200, (answer.status, body[:300])
        return json.loads(body)


@contextmanager
def served(folder: Path) -> Iterator[tuple[Client, psutil.Process]]:
    """A page over a folder, as a person starts it."""
    words = [sys.executable, str(ROOT / "train" / "page.py"), "port=0", "open=false"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Client(process.stdout.readline().split()[1]), psutil.Process(process.pid)
        finally:
            process.terminate()


def make_runs(runs: Path, count: int, steps: int) -> None:
    """So many runs of 60 steps, and one of so many steps."""
    for i in range(count):
        folder = runs / f"run-{i:04d}"
        (folder / "previews").mkdir(parents=True)
        lines = "".join(STEP % (step, 1 / step) for step in range(1, 61))
        (folder / "metrics.jsonl").write_text(lines + '{"step": 60, "validation_loss": 0.5}\n')
        (folder / "config.yaml").write_text(f"run: run-{i:04d}\nsteps: 100\nmodel:\n  path: somewhere\n")
    folder = runs / "long"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(STEP % (step, step**-0.5) for step in range(1, steps + 1)))
    (folder / "config.yaml").write_text(f"run: long\nsteps: {steps}\n")


def processor_share(process: psutil.Process, seconds: float, polled: Client | None = None) -> float:
    """The share of a core that the page takes while nothing happens; polled: as by a browser that shows the list."""
    before, end = sum(process.cpu_times()[:2]), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        took = polled.get("/api/runs")[0] if polled else 0.0
        time.sleep(min(left, max(1.5, 50 * took)))  # the page's own pace (train/watch/assets/watch.js)
    return (sum(process.cpu_times()[:2]) - before) / seconds


def holds_gpu(process: psutil.Process) -> bool:
    """Whether the page has opened a GPU or loaded torch."""
    files = list(Path(f"/proc/{process.pid}/fd").iterdir())
    opened = [str(file.readlink()) for file in files if file.is_symlink()]
    return any("/dev/nvidia" in name for name in opened) or any(
        "libtorch" in each.path or "libcuda" in each.path for each in process.memory_maps()
    )


def step_seconds(folder: Path, run: str, client: Client | None) -> float:
    """The median seconds of a step of a training; client: whoever watches it meanwhile, as a browser does."""
    words = [sys.executable, str(ROOT / "train" / "train.py"), *TRAINED, f"run={run}"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if client is not None and (folder / "runs" / run / "metrics.jsonl").is_file():
                for path in (f"/api/run?name={run}", f"/api/jobs?run={run}", f"/api/curves?name={run}"):
                    client.get(path)
            time.sleep(1.5)
    assert process.returncode == 0, f"the training ended with {process.returncode}"
    lines = map(json.loads, (folder / "runs" / run / "metrics.jsonl").read_text().splitlines())
    times = [float(line["seconds"]) for line in lines if "loss" in line and "seconds" in line]
    return median(times[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of watching while nothing happens")
    parser.add_argument("--train", type=int, default=0, help="trainings watched, and as many not watched")
    asked = parser.parse_args()
    rows: dict[str, float] = {}

    def row(name: str, value: float, limit: str) -> None:
        rows[name] = value
        print(f"{name:<52} {value:10.4g}   {limit}", flush=True)

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        make_runs(folder / "runs", asked.runs, asked.steps)
        with served(folder) as (client, process):
            steps = f"{asked.steps} steps drawn"
            for what, path in ((f"{asked.runs} runs listed", "/api/runs"), (steps, "/api/curves?name=long")):
                before = sum(process.cpu_times()[:2])
                first, said = client.get(path)
                row(f"s, {what}, first", first, "1")
                row(f"s of processor, {what}, first", sum(process.cpu_times()[:2]) - before, "1")
                row(f"s, {what}, again", min(client.get(path)[0] for _ in range(3)), "1")
                assert len(said.get("runs", ())) == asked.runs + 1 or said.get("count") == asked.steps
            row("of a core, nobody looks", processor_share(process, asked.seconds), "0.02")
            row(
                f"of a core, a browser shows {asked.runs} runs", processor_share(process, asked.seconds, client), "0.02"
            )
            row("MiB of memory", process.memory_info().rss / 2**20, "")
            row("GPU or torch opened (1 is yes)", float(holds_gpu(process)), "0")
        if asked.train:
            subprocess.run(
                [sys.executable, str(ROOT / "scripts/tiny/make_style.py"), str(folder / "runs/demo-pictures")],
                check=True,
            )
            times: dict[bool, list[float]] = {False: [], True: []}
            with served(folder) as (client, _):
                for i in range(asked.train):
                    for watched in (False, True):  # in turn: what else runs on the machine is the same for both
                        times[watched].append(step_seconds(folder, f"t{i}-{watched}", client if watched else None))
            row("s a step, not watched", median(times[False]), "")
            row("s a step, watched", median(times[True]), "the same")
            row("watched over not watched", median(times[True]) / median(times[False]), "1")
    print(json.dumps({"command": f"python scripts/bench_page.py {' '.join(sys.argv[1:])}".strip(), **rows}))


if __name__ == "__main__":
    main()
