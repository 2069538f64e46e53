"""Text settings: what is typed, in a shell or a file, is what the command gets."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.comparison.settings import Compare
from infer.program.command import run_command
from infer.program.literal import PLAIN, QUOTED, kind_of, literal, literal_arguments, split
from infer.program.settings import settings as names_of
from train.run.config import Train
from train.sweeps.sweep import main as sweep_main

MISREAD = ["1e3", "2024_08_20", "1_000", "007", "0.10", "true", "False", "NaN", "inf", "-1", "12:30", "1e-400",
           "photosété", "läufe", "日本", "a b", " a ", "a, b", "a=b", "it's", 'say "a"', "a\\b", "C:\\x\\", "(", "[a",
           "a]", "{a", "#1", "100%", "a\nb", "choice(a,b)", "str(1)", "~/pictures", "@a", "!", "?", "", "'",
           '"a" or "b"', "\\\\", "a\\'b", "$HOME", "^.*\\.attn\\.to_(q|k)$",
           "*", "-"]  # fmt: skip


def got(monkeypatch: pytest.MonkeyPatch, schema: type[Any], name: str, *arguments: str) -> Any:
    """The options of a command that is given arguments."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    run_command(name, schema, found.append)
    GlobalHydra.instance().clear()
    return found[0]


@pytest.mark.parametrize("texts", list(zip(*[iter(MISREAD)] * 3, strict=True)))  # three at a time
def test_texts_are_used_as_they_are_typed(monkeypatch: pytest.MonkeyPatch, texts: tuple[str, str, str]) -> None:
    trigger, run, group = texts
    options = got(monkeypatch, Train, "train", f"data.trigger={trigger}", f"run={run}", f"track.group={group}")
    assert (options.data.trigger, options.run, options.track.group) == texts


LISTS = [
    ("[1e3, true,null ,2024_08_20]", ["1e3", "true", "null", "2024_08_20"]),
    ("[a red star (large, bold), läufe]", ["a red star (large, bold)", "läufe"]),
    ("['a, b', \"it's\", x]", ["a, b", "it's", "x"]),
    ("[it's :(, a [b] c]", ["it's :(", "a [b] c"]),
    ("[]", []),
    ("[12:30]", ["12:30"]),
    ("[a: b, c = d]", ["a: b", "c = d"]),
]


@pytest.mark.parametrize("text, values", LISTS)
def test_lists_of_texts(monkeypatch: pytest.MonkeyPatch, text: str, values: list[str]) -> None:
    options = got(monkeypatch, Train, "train", f"previews={text}", f"track.tags={text}", "steps=1_000")
    assert options.previews == options.track.tags == values and options.steps == 1000


def test_texts_within_groups_lists_and_dictionaries(monkeypatch: pytest.MonkeyPatch) -> None:
    options = got(
        monkeypatch, Train, "train", "data.sources=[{path:1e3,repeats:1e1,masks:null},{path: ä b,caption_column:true}]",
        "precision.layers={a.b:nf4}", "precision.layers.c.*.d=int8", "data.resolution=[64,128]", "optim.lr=1e-3",
    )  # fmt: skip
    first, second = options.data.sources
    assert (first.path, first.repeats, first.masks) == ("1e3", 10.0, None)
    assert (second.path, second.caption_column) == ("ä b", "true")
    assert options.precision.layers == {"a.b": "nf4", "c.*.d": "int8"} and options.data.resolution == [64, 128]
    assert options.optim.lr == 0.001
    options = got(
        monkeypatch, Compare, "compare", "adapter={path:1e3,also:[{path:2e3,weight:1e-1}]}", "+recovery.nf4=1e3",
        "only=[nf4]", "+precision@precisions.own=fp4",
    )  # fmt: skip
    assert (options.adapter.path, options.adapter.also[0].path, options.adapter.also[0].weight) == ("1e3", "2e3", 0.1)
    assert options.recovery == {"nf4": "1e3"} and options.precisions["own"].kind == "fp4"


def test_null_quotation_marks_and_references_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "läufe")
    options = got(
        monkeypatch, Train, "train", "data.trigger=null", 'run="null"', "data.path=${oc.env:WHERE}/${seed}-ä", "seed=7",
        "track.group='a, b'", r"data.prefix=\${x}",
    )  # fmt: skip
    assert (options.data.trigger, options.run, options.data.path) == (None, "null", "läufe/7-ä")
    assert (options.track.group, options.data.prefix) == ("a, b", "${x}")


def test_every_text_setting_of_a_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [name for name in names_of(Train) if kind_of(Train, name) in (str, str | None)]
    assert {"run", "data.path", "optim.name", "push", "adapter.start", "data.prior.prompt"} <= set(texts)
    for name in texts:
        for argument in (f"{name}=1e3", f"+{name}=1e3", f"++{name}=1e3"):
            assert literal_arguments([argument], Train) == [argument.replace("1e3", "'1e3'")]


@settings(max_examples=300)
@given(st.text(min_size=1).filter(lambda text: not QUOTED.fullmatch(text.strip()) and text.strip().lower() != "null"))
def test_hydra_reads_back_any_text(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={literal(text, str)}"])
    value = override.value()
    assert getattr(value, "text", value) == text


@settings(max_examples=300)
@given(st.text(alphabet="ab 1,[]{}():'\"\\\\ä", max_size=12))
def test_splitting_loses_nothing(text: str) -> None:
    parts = split(text)
    assert parts is None or ",".join(parts) == text
    for kind in (str, list[str], dict[str, str], int, None):
        for several in (False, True):
            made = literal_arguments([f"run={text}", f"previews={text}"], Train, several)
            assert [one.partition("=")[0] for one in made] == ["run", "previews"]
        assert literal("a-b", kind) == "a-b" and PLAIN.fullmatch("a-b")


FILE = """# @package _global_
defaults:
  - override /precision: int8
data:
  trigger: 1e3
  prefix: "1e3"
  resolution: 64
  path: 2024_08_20
  masks: null
  sources: [{path: 012, weight: 1e1}]
run: 12:30
previews: [1e3, yes, null, ~, a]
track: {tags: [0x10]}
steps: 1_000
sweep:
  objectives: {seconds: minimize}
"""


def test_a_file_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "experiment" / "läufe.yaml").write_text(FILE.replace("  path: 2024_08_20\n  masks: null\n", ""))
    (tmp_path / "data" / "own.yaml").write_text(
        "defaults: [folder, _self_]\npath: 1e3\ntrigger: true\nbatch_size: 0x2\n"
    )
    options = got(monkeypatch, Train, "train", "--config-dir", str(tmp_path), "experiment=läufe")
    assert (options.data.trigger, options.data.prefix, options.run) == ("1e3", "1e3", "12:30")
    assert options.previews == ["1e3", "yes", "null", "~", "a"] and options.track.tags == ["0x10"]
    assert (options.data.resolution, options.steps, options.precision.kind) == (64, 1000, "int8")
    assert (options.data.sources[0].path, options.data.sources[0].weight) == ("012", 10.0)
    options = got(monkeypatch, Train, "train", "--config-dir", str(tmp_path), "data=own")
    assert (options.data.path, options.data.trigger, options.data.batch_size) == ("1e3", "true", 2)


@dataclass
class Nested:
    texts: dict[str, list[str]] = field(default_factory=dict)
    number: int | None = None
    either: int | str = 0


def test_types_are_found() -> None:
    assert kind_of(Nested, "texts.a") == list[str] and kind_of(Nested, "texts.a.0") is str
    assert kind_of(Nested, "number.x") is kind_of(Nested, "nope") is kind_of(Nested, "texts.a.b") is None
    assert literal_arguments(["texts={a:[1e3,b],c: [ä]}"], Nested) == ["texts={a:['1e3',b],c:['ä']}"]
    assert literal_arguments(["number=1", "number=ä", "either=1"], Nested) == ["number=1", "number='ä'", "either=1"]


@pytest.mark.parametrize(
    "argument, made",
    [
        ("data.trigger=1e3,2e3", "data.trigger='1e3','2e3'"),
        ("data.trigger='a, b',ä", "data.trigger='a, b','ä'"),
        ("data.trigger=choice(1e3,null)", "data.trigger=choice('1e3',null)"),
        ("previews=[1e3],[true,b]", "previews=['1e3'],['true',b]"),
        ("optim.name=adamw,prodigy", "optim.name=adamw,prodigy"),
        ("optim.lr=1e-3,1e-4", "optim.lr=1e-3,1e-4"),
        ("optim.lr=tag(log,interval(1e-5,1e-3))", "optim.lr=tag(log,interval(1e-5,1e-3))"),
        ("seed=range(3)", "seed=range(3)"),
        ("precision=nf4,4", "precision=nf4,'4'"),
        ("run=läufe", "run='läufe'"),
        ("hydra/launcher=basic", "hydra/launcher=basic"),
        ("hydra.sweeper.n_trials=5", "hydra.sweeper.n_trials=5"),
        ("~sweep.objectives.seconds", "~sweep.objectives.seconds"),
        ("--config-dir=a,b", "--config-dir=a,b"),
    ],
)
def test_values_of_a_sweep(argument: str, made: str) -> None:
    assert literal_arguments([argument], Train, sweep=True) == [made]


def test_a_sweep_gives_its_points_what_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      data.suffix: 1e3,true\ndata:\n  prefix: 1e3\n"
    )
    points: list[tuple[Any, list[str]]] = []

    def run_point(config: Any, overrides: list[str], *_: Any) -> tuple[float]:
        points.append((config, overrides))
        return (0.0,)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.sweeps.point.run_point", run_point)
    monkeypatch.setattr("train.sweeps.report.conclude", lambda _: None)
    arguments = ["data.trigger=1e3,ä", "experiment=own", "run=2024_08_20", "--config-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
    sweep_main()
    GlobalHydra.instance().clear()
    found = {(c["data"]["trigger"], c["data"]["suffix"], c["data"]["prefix"], c["run"]) for c, _ in points}
    assert found == {(a, b, "1e3", "2024_08_20") for a in ("1e3", "ä") for b in ("1e3", "true")}
    for config, overrides in points:  # what the point's own command gets
        options = got(monkeypatch, Train, "train", "--config-dir", str(tmp_path), *overrides[:-1], overrides[-1])
        assert (options.data.trigger, options.data.suffix) == (config["data"]["trigger"], config["data"]["suffix"])
