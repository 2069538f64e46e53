"""The benchmark of the data, small: its rows are what its parts measure, of pictures that differ."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from infer.sample.picture import decode, pixel_hash
from scripts import bench_data, painted
from train.data.dataset import Data
from train.data.samples import read_samples


def test_pictures_differ_and_are_painted_once(tmp_path: Path) -> None:
    painted.paint_folder(tmp_path / "all", 40, 64)
    samples, _ = read_samples(Data(str(tmp_path / "all")))
    assert len({pixel_hash(decode(sample.read(), sample.name)) for sample in samples}) == len(samples) == 40
    assert {Path(sample.name).suffix for sample in samples} == {".png", ".jpg"}
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "all").rglob("*")}
    painted.paint_folder(tmp_path / "all", 40, 64)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "all").rglob("*")} == times
    painted.part_of(tmp_path / "some", tmp_path / "all", 7)
    some, _ = read_samples(Data(str(tmp_path / "some")))
    assert [sample.read() for sample in some] == [sample.read() for sample in samples[:7]]


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def within(args: argparse.Namespace, part: str, pictures: Path, cache: Path) -> dict[str, Any]:
        return bench_data.CHILDREN[part](args, pictures, cache)

    monkeypatch.setattr(bench_data, "run_part", within)
    given = {"--folder": tmp_path, "--pictures": 6, "--side": 32, "--samples": 24, "--alone": 0.01}
    arguments = [str(word) for pair in given.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["bench_data.py", *arguments, "--out", str(tmp_path / "rows.jsonl")])
    bench_data.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = ["name", "unit", "target", "measured", "machine", "date", "versions", "command"]
    assert len(rows) == 15 and all(list(row) == names for row in rows)
    assert all(any(line.startswith(row["name"]) for line in lines) for row in rows)
    assert rows[0]["command"] == "python scripts/bench_data.py " + " ".join(arguments)
    of = {(row["name"], row["unit"]): row["measured"] for row in rows}
    rate, took = of["warm: all", "pictures/s"], of["warm: all", "ms/picture"]
    assert (
        rate * took == pytest.approx(1000, rel=1e-3)
        and rate > of["cold: all, models loaded and texts encoded too", "pictures/s"]
    )
    assert all(row["measured"] > 0 for row in rows if "memory" not in row["name"])
