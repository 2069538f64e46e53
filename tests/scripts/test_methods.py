"""scripts/tiny/methods.py's settings against the shipped ones, its prompts, and its tables' means."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from infer.program.paths import CONFIGS
from scripts.tiny import world
from scripts.tiny.check import parse
from scripts.tiny.method_sets import LEARNED, SHAPE, Task, make_pictures, prompts, variants
from scripts.tiny.method_table import table
from scripts.tiny.methods import Run, main

KINDS = ("person", "object", "style", "concept")


@pytest.mark.parametrize("kind", KINDS)
def test_experiments_are_the_shipped_ones(kind: str) -> None:
    shipped = yaml.safe_load((CONFIGS / "experiment" / f"{kind}.yaml").read_text())
    own = variants()["experiments"][kind]
    adapter = own.get("adapter", variants()["adapters"]["lora, 0.001"]["adapter"])
    assert own["ema"] == shipped["ema"]
    assert {name: getattr(adapter, name) for name in shipped["adapter"]} == shipped["adapter"]
    assert own.get("caption_dropout", 0.0) == shipped.get("data", {}).get("caption_dropout", 0.0)
    groups: dict[str, str] = {}
    for default in shipped.get("defaults", []):
        groups |= {name.removeprefix("override /"): value for name, value in default.items()}
    preserve = own.get("preserve")
    assert (preserve.kind if preserve else "none") == groups.get("preserve", "none")


@pytest.mark.parametrize("task", [Task("object", "dotted"), Task("concept", "dotted"), Task("style", "zelk style")])
def test_prompts_ask_for_what_no_picture_shows(task: Task, tmp_path: Path) -> None:
    make_pictures(tmp_path, task)
    captions = [json.loads(line)["text"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    wanted = prompts(task)
    assert all(task.trigger in text for text in captions + wanted["subject"])
    assert not any(task.trigger in text for text in wanted["class"] + wanted["unrelated"])
    assert [task.without(text) for text in wanted["subject"]] == wanted["class"]
    assert not set(captions) & set(wanted["subject"])
    shapes = {shape for text in wanted["class"] for shape, _ in parse(text).pairs}
    if task.name == "object":
        assert shapes == {SHAPE}
    elif task.name == "concept":
        assert not shapes & set(LEARNED)
        assert {shape for text in captions for shape, _ in parse(task.without(text)).pairs} == set(LEARNED)
    else:
        assert len(shapes) > len(world.SHAPES) / 2


def row(variant: str, seed: int, inked: float, **more: float) -> dict[str, object]:
    names = ("subject_right", "class_moved", "unrelated_inked", "unrelated_moved", "validation_loss")
    own = {"set": "objectives", "variant": variant, "seed": seed, "subject_inked": 1.0, "class_inked": inked}
    own |= {"steps": 100, "trigger": "dotted"}
    return own | dict.fromkeys(names, 0.25) | more


def test_tables_show_means_with_limits_and_the_default_beside_objectives() -> None:
    rows = [row("nothing", seed, 0.5) | {"set": "preservation"} for seed in range(2)]
    rows += [row("huber", seed, value, apart=0.4) for seed, value in enumerate((0.0, 0.5, 1.0))]
    lines = table(rows, "objectives").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    titles = cells[0]
    inked = titles.index("without: inked")
    assert [line[0] for line in cells[2:]] == ["nothing", "huber"]
    assert cells[2][:3] == ["nothing", "2", "0.00"] and cells[3][:3] == ["huber", "3", "0.40"]
    assert cells[2][inked] == "0.50"  # no limits where all are alike
    assert cells[3][inked].startswith("0.50 (0.") and cells[3][inked].endswith(")")
    assert cells[3][titles.index("validation loss")] == "0.250"
    other = [*rows, row("huber", 0, 0.0, apart=0.1) | {"trigger": "zelk"}]
    names = [line.split("|")[1].strip() for line in table(other, "objectives").splitlines()[3:]]
    assert names == ["huber, 100 steps, dotted", "huber, 100 steps, zelk"]


def test_what_a_run_depends_on_tells_it_from_others() -> None:
    common: dict[str, Any] = {
        "set": "preservation",
        "variant": "nothing",
        "seed": 0,
        "device": "cpu",
        "out": Path("m"),
        "until": 0.0,
    }
    runs = [Run(**common, steps=steps, trigger=word) for steps in (100, 8) for word in ("dotted", "zelk")]
    assert len({run.key for run in runs}) == len({run.name_of("nothing") for run in runs}) == 4
    style = Run(**(common | {"set": "experiments", "variant": "style"}), steps=100, trigger="zelk")
    assert style.key[3:] == (200, "zelk style")  # its own


def test_a_variant_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["methods.py", str(tmp_path / "rows"), "--only", "nothing", "clas"])
    with pytest.raises(ValueError, match=r"no variant \['clas'\] in preservation, "):
        main()
    assert not list(tmp_path.iterdir())
