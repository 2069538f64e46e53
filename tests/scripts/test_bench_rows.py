"""Benchmarks: a worker that dies loses one variant, rows say what was asked and met, published rows are whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from infer.program.paths import ROOT
from scripts import bench_rows
from scripts.bench_train import rows_of

PLACE = {"card": "a card", "date": "2026-01-01", "versions": {"torch": "2"}, "command": "python scripts/bench_train.py"}
WORKER = """
import json, os, sys
out, names = sys.argv[2], sys.argv[4:]
for name in names:
    if name == "dies":
        os.kill(os.getpid(), 9)
    with open(out, "a") as file:
        file.write(json.dumps({"variant": name, "pid": os.getpid()}) + "\\n")
"""


def test_a_worker_that_dies_loses_the_variant_it_was_at(tmp_path: Path) -> None:
    script, out = tmp_path / "worker.py", tmp_path / "seen.jsonl"
    script.write_text(WORKER)
    bench_rows.run_workers(script, [["a", "dies", "b"], ["c"]], out, 60, [], needs=[0.5, 0.5])
    seen = {line["variant"]: line for line in bench_rows.read_lines(out)}
    assert seen.keys() == {"a", "b", "c", "dies"}
    assert seen["dies"]["error"] == "the process ended with code -9"
    assert seen["a"]["pid"] != seen["b"]["pid"]


GANG_WORKER = """
import json, os, sys, time
from pathlib import Path
from scripts.bench_gang import alone
out, gang, name = sys.argv[4], Path(sys.argv[6]), sys.argv[8]
if name == "dies":
    sys.exit(3)
if name == "never ready":
    time.sleep(1000)
prepared = time.time()
with alone(gang):
    start = time.time()
    time.sleep(0.3)
    end = time.time()
with open(out, "a") as file:
    file.write(json.dumps({"variant": name, "prepared": prepared, "start": start, "end": end}) + "\\n")
"""


def test_a_gang_is_timed_one_by_one_once_all_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, out = tmp_path / "worker.py", tmp_path / "seen.jsonl"
    script.write_text(GANG_WORKER)
    names = ["a", "dies", "b", "never ready", "large"]
    bench_rows.run_gangs(script, names, out, 5, lambda name: 7.0 if name == "large" else 2.0, 8.0)
    seen = {line["variant"]: line for line in bench_rows.read_lines(out)}
    assert seen.keys() == set(names)
    assert seen["dies"]["error"] == "the process ended with code 3"
    assert seen["never ready"]["error"] == "the process ended with code -9"
    first, second = sorted((seen["a"], seen["b"]), key=lambda line: line["start"])
    assert max(first["prepared"], second["prepared"]) <= first["start"] and first["end"] <= second["start"]
    assert seen["large"]["start"] >= second["end"]  # the card does not hold it beside them


@pytest.mark.parametrize(
    ("measured", "target", "expected"),
    [(2.0, ">= 2.0", "yes"), (1.9, ">= 2.0", "no"), (9.1, "<= 9.0", "no"), (None, "<= 9.0", "no"), (1.0, None, "")],
)
def test_targets(measured: float | None, target: str | None, expected: str) -> None:
    assert bench_rows.met(bench_rows.make_row("x", "x", measured, target, PLACE)) == expected


def test_rows_hold_ratios_of_one_run_and_what_failed() -> None:
    def seen(seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "allocated_gib": 9.0, "reserved_gib": 10.0, **PLACE}

    results = {
        "reference-nf4-1024": seen(1.0),
        "nf4-1024-balanced": seen(0.4),
        "int8-1024-balanced": {"error": "out of memory", **PLACE},
    }
    rows = {row["name"]: row for row in rows_of(results)}
    ratio = rows["train nf4-1024-balanced: faster than reference-nf4-1024"]
    assert ratio["measured"] == pytest.approx(2.5) and ratio["target"] == ">= 2.0"
    failed = rows["train int8-1024-balanced"]
    assert failed["measured"] is None and failed["error"] == "out of memory"
    assert not any("int8" in name and "slower" in name for name in rows)


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "benchmarks").glob("*.jsonl")), ids=lambda file: file.stem)
def test_published_rows_say_all(file: Path) -> None:
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert {"name", "unit", "target", "measured", "date", "versions", "command"} <= row.keys()
        assert row.keys() & {"card", "machine"} and row["command"].startswith("python scripts/")
