"""A sweep's report: the front against its definition, figures against hand-made ones, the page in a browser."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.sweeps.pareto import front_of
from train.sweeps.report import best_of, conclude, read_points, write
from train.trackers.figures import objectives_of, read_figures

if TYPE_CHECKING:
    from tests.browser import Browser

MINIMA = {"validation_loss": "minimize", "memory_gib": "minimize", "score": "maximize"}
HOSTILE = "a </script><b>'\" & ${x}"


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int, int]]) -> None:
    points = np.array(values) * [1, 1, -1]  # the third is maximized
    beaten = [any((other <= one).all() and (other < one).any() for other in points) for one in points]
    assert front_of(values, list(MINIMA.values())) == [not each for each in beaten]


def make_point(sweep: Path, name: str, loss: float, memory: float, score: float, state: str = "done") -> None:
    """A point as a sweep leaves it, with two pictures of one colour each."""
    folder = sweep / name
    (folder / "compare" / "images").mkdir(parents=True)
    losses = [{"step": step, "loss": loss + 1 / step, "seconds": 0.5, "memory_gib": memory} for step in range(1, 101)]
    checks = [{"step": step, "validation_loss": loss + (100 - step) / 100} for step in (0, 50, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*losses, *checks]) + '{"st')
    rows = []
    for adapter, shade in ((None, 10), ("mine", int(100 * loss))):
        Image.new("RGB", (64, 64), (shade, 0, 99)).save(folder / "compare" / "images" / f"{adapter}.png")
        row = {"precision": "nf4", "adapter": adapter, "prompt": HOSTILE, "seed": 0, "image": f"images/{adapter}.png"}
        row |= {"seconds": 0.25, "seconds_per_step": 0.1, "weights_bytes": 2**29, "peak_memory_bytes": 2**30}
        row |= {"scores": {"score": score if adapter else None}}
        rows.append(row | {"stages": {"load": {"seconds": 1.0, "peak_memory_bytes": 2**29}}})
    result = {"model": "m", "device": "cpu", "versions": {}, "sampling": {}, "rows": rows}
    (folder / "compare" / "results.json").write_text(json.dumps(result))
    config = {"run": sweep.name, "steps": 100, "model": {"path": "m"}, "data": {"path": HOSTILE, "sources": []}}
    config |= {"sweep": {"objectives": MINIMA}, "track": {}, "device": "cpu", "adapter": {"rank": 4}}
    record: dict[str, Any] = {"name": name, "values": {"adapter.rank": name[-1]}, "config": config, "state": state}
    record |= {"stages": {"train": {}, "compare": {}}, "error": HOSTILE if state == "failed" else None}
    record["figures"] = read_figures(folder, compared=True)
    (folder / "point.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "set"
    make_point(folder, "rank-2", 0.5, 1.0, 3.0)
    make_point(folder, "rank-4", 0.4, 2.0, 3.0)
    make_point(folder, "rank-6", 0.6, 2.5, 2.0)  # beaten by both
    make_point(folder, "rank-8", 0.7, 3.0, 9.0)
    make_point(folder, "rank-9", 0.1, 0.1, 9.0, "failed")
    write(folder)
    return folder


def test_figures(sweep: Path) -> None:
    figures = read_figures(sweep / "rank-2", compared=True)
    last = np.mean([0.5 + 1 / step for step in range(91, 101)])
    assert figures == pytest.approx(
        {"loss": last, "seconds": 50.0, "seconds_per_step": 0.5, "memory_gib": 1.0, "validation_loss": 0.5}
        | {"image_seconds": 0.25, "image_memory_gib": 1.0, "score": 3.0}
    )
    assert "score" not in read_figures(sweep / "rank-2", compared=False)
    assert objectives_of(figures, MINIMA) == (0.5, 1.0, 3.0)
    with pytest.raises(ValueError, match=r"sweep.objectives names psnr, which this point has not; it has loss, "):
        objectives_of(figures, {"psnr": "maximize"})


def test_what_is_on_the_front_and_what_is_best(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = read_points(sweep)
    assert {p.name: p.front for p in points} == {
        "rank-2": True, "rank-4": True, "rank-6": False, "rank-8": True, "rank-9": None
    }  # fmt: skip
    best = best_of(points)
    assert best is not None and best.name == "rank-4"
    with pytest.raises(ValueError, match=r"1 of 5 points failed \(rank-9: "):
        conclude(sweep)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["point", "state", "validation_loss"]
    assert lines[4].split() == ["rank-4", "front", "0.400", "2.000", "3.000"]
    results = json.loads((sweep / "results.json").read_text())
    assert [point["state"] for point in results] == ["done"] * 4 + ["failed"]


def test_no_points(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no points; give the folder of a sweep"):
        read_points(tmp_path)


def test_the_page_in_a_browser(sweep: Path, browser: "Browser") -> None:
    browser.open(sweep / "report.html")
    assert browser.problems() == [] and browser.overflow() <= 0
    assert browser.js("return document.title") == "Sweep set"
    order = "return [...document.querySelectorAll('#points tbody tr')].map((row) => row.cells[0].textContent)"
    browser.find("#points th:nth-child(4) button").click()
    assert browser.js(order)[:4] == ["rank-9", "rank-4", "rank-2", "rank-6"]
    drawn = "return [...document.querySelectorAll('#front figure')].map((f) => [f.querySelector('strong').textContent, "
    drawn += "f.querySelectorAll('circle').length, f.querySelectorAll('circle.best').length])"
    assert browser.js(drawn) == [
        ["validation_loss against memory_gib", 4, 3], ["validation_loss against score", 4, 3]
    ]  # fmt: skip
    # what costs less stands at the left, what is lost less at the bottom
    place = (
        "return [...document.querySelectorAll('#front figure:first-child circle')].map((c) => [+c.getAttribute('cx'), "
    )
    (x2, y2), (x4, y4), *_ = browser.js(place + "+c.getAttribute('cy')])")
    assert x2 < x4 and y2 < y4
    assert browser.js("return document.querySelectorAll('#curves figure').length") == 2
    lines = "return [...document.querySelectorAll('#curves figure:first-child polyline')].map((l) => l.points.length)"
    assert browser.js(lines) == [3] * 5
    assert browser.js("return document.querySelector('#failed td').textContent") == HOSTILE
    assert browser.js("return document.querySelectorAll('#pictures .picture').length") == 10
    assert browser.js("return document.querySelector('#pictures .text').textContent") == HOSTILE
    browser.find("#pictures .picture").click()
    assert browser.js("return document.querySelector('dialog').open")
