"""A quick part of each of the programs that prove that nothing is lost; the long ones are in docs/nothing-lost.md."""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from infer.program.paths import ROOT
from scripts.bad.case import Case, Outcome, judge, meet
from scripts.bad_input import KINDS, cases, commands, spread
from scripts.fault.things import things
from scripts.faults import Matrix
from scripts.fuzz import fuzz, mutate, targets
from tests.forked import Forked


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FLUX_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-cache")


QUICK = {"picture": 3, "caption": 3, "table": 2, "mask": 2, "setting": 5, "adapter": 2, "checkpoint": 4, "model": 3,
         "report": 5}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_some_bad_inputs(kind: str, cache: Path) -> None:
    works = commands()
    for case in spread(list(cases(kind)), QUICK[kind]):
        assert judge(case, works[case.command], cache) == [], case.name


def test_the_corpus_is_large_and_each_case_is_another() -> None:
    every = [(kind, case.name) for kind in KINDS for case in cases(kind)]
    assert len(every) == len(set(every)) > 500


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    def ends(work: object, said: str = "x") -> str:
        case = Case("any", "any", lambda _: (Path("input").write_text("a"), [])[1], said, "report")
        return " ".join(judge(case, lambda _: exec(str(work), {"Path": Path, "sys": sys}), tmp_path))

    def refuse(more: str = "pass") -> str:
        return f"{more}; print('error: x is wrong', file=sys.stderr); sys.exit(2)"

    assert ends(refuse()) == ""
    assert "no error" in ends("pass")
    assert "a traceback" in ends("raise KeyError('x')")
    assert "a defect" in ends("sys.exit(1)")
    assert "another message" in ends(refuse(), "y")
    assert "2 paragraphs" in ends(refuse("print('error: one')"))
    assert "it changed input" in ends(refuse("Path('input').write_text('b')"))
    assert "it left .a.1.partial" in ends(refuse("Path('.a.1.partial').write_text('b')"))
    assert "it left out/a" in ends(refuse("Path('out').mkdir(); Path('out/a').write_text('b')"))
    assert meet(lambda _: print("\u00e9"), []) == Outcome(0, "\u00e9\n", [], [])


@pytest.mark.parametrize(
    "thing", [thing for thing in things() if thing.name != "results"], ids=lambda thing: thing.name
)
def test_faults_while_writing_and_damage_after(thing: object) -> None:
    matrix = Matrix(quick=True)
    matrix.writes(thing)  # type: ignore[arg-type]
    matrix.damage(thing, random.Random(1))  # type: ignore[arg-type]
    assert matrix.wrong == []
    assert matrix.counts["faults"] >= 8 and matrix.counts["damages"] >= 8


def test_fuzzed_files(tmp_path: Path) -> None:
    counts = Counter[str]()
    for target in targets(tmp_path):
        assert fuzz(target, 60, random.Random(f"7 {target.name}"), counts) == []
    assert counts["refused"] > 100 and counts["read"] > 0


def test_every_mutation_is_another_file() -> None:
    content = b"\x18\0\0\0\0\0\0\0" + b'{"a": 1, "b": [2, "cd"]}' + bytes(range(200))
    rng = random.Random(3)
    assert len({mutate(content, rng) for _ in range(300)} - {content}) > 250


def test_three_kills(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "soak.py"), "--kills=3", "--only=train"]
    code, said = Forked(command, tmp_path, os.environ, tmp_path / "said").finish(600)
    assert code == 0, said
    figures = json.loads(said.splitlines()[-1])
    assert figures["kills"] == 3 and figures["finished"] >= 1
    assert figures["lost"] == figures["differing"] == figures["broken"] == figures["left"] == 0
