"""scripts/check_gpu.py on a CPU: a row of it, what its figures mean, and the exit code."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from infer.program.errors import DIFFERS
from scripts import bench_rows, check_gpu
from scripts.check.case import CASES, KLEIN
from scripts.check.figures import apart, decibels, relative, share
from scripts.check.matrix import drawing, gradient_figures
from scripts.check.rows import WORK, groups, possible
from scripts.check.runs import learned, pictures_of
from scripts.check.table import row_of, table
from scripts.tiny.make_style import make_style
from tests.tiny_klein import make_klein


def test_a_row_holds_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_style(tmp_path / "pictures", 12, 0)
    line = check_gpu.check("fp32-plain-lora", torch.device("cpu")) | {"variant": "fp32-plain-lora"}
    assert line["figures"]["resumed, largest difference"] == [0.0, "<=", 0.0]
    gradient = line["figures"]["gradient against fp32 on a CPU"][0]
    assert gradient == 0  # the same computation
    row = row_of(line | bench_rows.circumstances(torch.device("cpu")))
    assert bench_rows.met(row) == "yes" and row["name"] == "gpu fp32-plain-lora"
    assert learned("fp32-plain-lora").keys()
    assert len(pictures_of(drawing(CASES["fp32-plain-lora"]))) == 2


def test_a_klein_is_made_on_the_spot_and_its_8_bit_products_are_near_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_klein(tmp_path / KLEIN)
    (figure,) = gradient_figures(CASES["klein-nf4-int8-fused-lora"], torch.device("cpu")).values()
    value, sign, limit = figure
    assert 1e-3 < value < limit and sign == "<=", "rounded, but not far"


def test_every_row_is_in_one_process_and_plain_comes_before_what_is_compared_with_it() -> None:
    shared = groups(list(WORK))
    assert sorted(name for group in shared for name in group) == sorted(WORK)
    for group in shared:
        seen = [CASES[name] for name in group if name in CASES]
        for case in seen:
            assert case.plain not in seen or seen.index(case.plain) <= seen.index(case)
    for model in ("", KLEIN):
        assert {case.path for case in CASES.values() if case.model == model} == {"plain", "fused", "streamed"}
    assert not any(case.eight for case in CASES.values() if case.path == "plain")
    on_cpu = [name for name in WORK if possible(name, cpu=True)]
    assert {"nf4-fused-dora", "klein-merge"} <= {*on_cpu} and not any(
        "streamed" in name or "budget" in name for name in on_cpu
    )


def test_figures_by_hand() -> None:
    assert share(0.01, "<=", 0.02) == 0.5 and share(40.0, ">=", 35.0) < 1 < share(30.0, ">=", 35.0)
    assert share(0.0, "<=", 0.0) == 0 and share(1e-9, "<=", 0.0) > 1 and share(0.0, ">=", 1.0) > 1
    assert relative([torch.tensor([3.0, 5.0])], [torch.tensor([3.0, 4.0])]) == pytest.approx(0.2)
    black, grey = (Image.new("RGB", (4, 4), colour) for colour in ((0, 0, 0), (51, 51, 51)))
    assert decibels(black, black) == 99 and decibels(black, grey) == pytest.approx(13.98, abs=0.01)
    one = {"x.lora_A.weight": torch.zeros(2), "x.lora_B.weight": torch.tensor([3.0, 4.0])}
    other = one | {"x.lora_A.weight": torch.tensor([0.0, 1.0])}
    assert apart(other, one) == pytest.approx(0.2)


@pytest.mark.parametrize(("second", "code"), [(0.5, 0), (1.5, DIFFERS), (None, DIFFERS), ("error", DIFFERS)])
def test_the_exit_code_tells(
    second: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure beyond its limit, a row that failed, and one whose process said nothing."""

    def run(script: Path, groups: list[list[str]], out: Path, **_: Any) -> None:
        for name, value in (("merge", 0.1), ("resolutions", second)):
            line = {"variant": name, **bench_rows.circumstances(torch.device("cpu"))}
            if value == "error":
                bench_rows.append(out, line | {"error": "ValueError: why"})
            elif value is not None:
                bench_rows.append(out, line | {"figures": {"far": [value, "<=", 1.0]}, "seconds": 2.0})

    monkeypatch.setattr(bench_rows, "run_workers", run)
    rows = tmp_path / "rows.jsonl"
    arguments = ["check_gpu.py", "--cpu", "--only", "merge", "resolutions", "--rows", str(rows)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(check_gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(check_gpu.os, "environ", dict(check_gpu.os.environ))
    with pytest.raises(SystemExit) as ended:
        check_gpu.main()
    assert ended.value.code == code
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["name"] for row in written] == ["gpu merge", "gpu resolutions"]
    said = capsys.readouterr().out
    assert ("DIFFERS" in said) == (second == 1.5) and ("FAILED" in said) == (second in (None, "error"))
    assert table(written) in said
