"""Comparisons whose results.json cannot be reported, through `python -m infer.report`."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.bad.case import Case, colours

STAGE = {"seconds": 1.0, "peak_memory_bytes": 1}
ROW = {"precision": "bf16", "adapter": None, "prompt": "a", "seed": 0, "image": "images/a.png", "seconds": 1.0,
       "seconds_per_step": 1.0, "weights_bytes": 1, "peak_memory_bytes": 1, "scores": {"own": 1.0},
       "stages": {"load": STAGE}}  # fmt: skip
RESULT = {"model": "tiny", "device": "cpu", "versions": {"torch": "2"}, "sampling": {"steps": 1}, "rows": [ROW]}
SAID = "must be finite|results.json holds no comparison|Row 0|A report needs rows|is no picture|results.json"


def raw(name: str, content: bytes | None, said: str = SAID) -> Case:
    def make(folder: Path) -> list[str]:
        (folder / "compared" / "images").mkdir(parents=True)
        colours(1).save(folder / "compared" / "images" / "a.png")
        if content is not None:
            (folder / "compared" / "results.json").write_bytes(content)
        return ["compared"]

    return Case("report", name, make, said, "report")


def changed(name: str, change: Callable[[Any], object]) -> Case:
    result = copy.deepcopy(RESULT)
    change(result)
    return raw(name, json.dumps(result).encode())


def cases() -> Iterator[Case]:
    yield Case("report", "no folder", lambda _: [], "give one folder", "report")
    yield Case("report", "an absent folder", lambda _: ["nowhere"], "nowhere/results.json", "report")
    for name, content in (("absent", None), ("empty", b""), ("no JSON", b"{"), ("no UTF-8", b"\xff"), ("a list", b"[]"),
                          ("null", b"null"), ("a number", b"3"), ("an empty object", b"{}")):  # fmt: skip
        yield raw(f"results.json: {name}", content)
    for key in RESULT:
        yield changed(f"no {key}", lambda result, key=key: result.pop(key))  # type: ignore[misc]
    for key in ROW:
        if key != "adapter":
            yield changed(f"a row without {key}", lambda result, key=key: result["rows"][0].pop(key))  # type: ignore[misc]
    for name, key, value in (
        ("an empty list of rows", "rows", []),
        ("rows that are an object", "rows", {"a": 1}),
        ("rows of text", "rows", ["a"]),
        ("versions that are text", "versions", "2"),
        ("a model that is a number", "model", 3),
    ):
        yield changed(name, lambda result, key=key, value=value: result.update({key: value}))  # type: ignore[misc]
    values: tuple[tuple[str, str, Any], ...] = (
        ("an absent picture", "image", "images/none.png"),
        ("a picture that is the folder", "image", "images"),
        ("a picture that is none", "image", "results.json"),
        ("a picture out of the folder", "image", "../../../../../../etc/hostname"),
        ("an absolute picture", "image", "/etc/hostname"),
        ("seconds that are text", "seconds", "long"),
        ("seconds that are not a number", "seconds", float("nan")),
        ("a score that is infinite", "scores", {"own": float("inf")}),
        ("a prompt that is a number", "prompt", 3),
        ("stages that are a list", "stages", []),
    )
    for name, key, value in values:
        yield changed(name, lambda result, key=key, value=value: result["rows"][0].update({key: value}))  # type: ignore[misc]
