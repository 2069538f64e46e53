"""Nothing that runs a stranger's program, and no token in anything that is written."""

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infer.checkpoint.model import Model
from infer.program.errors import fail
from infer.program.paths import ROOT
from infer.program.secrets import check_values, hide
from infer.quantize.precision import Precision
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.look import Look, look
from train.run.config import Train
from train.trackers.options import Track
from train.train import train

FAKE = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlant",
    "WANDB_API_KEY": "9f2planted8e7d6c5b4a39f28e7d6c5b4a39f28e",
    "MY_SERVICE_SECRET": "planted/secret+value==",
}
PROGRAMS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# the bad inputs are made with them, and read by nothing
MAKERS = ("scripts/bad/adapters.py", "scripts/bad/models.py")


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every call in our code: file, the function's dotted name, and its constant keyword arguments."""
    for folder in ("infer", "train", "scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name in MAKERS:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    module = getattr(node, "module", None) or ""
                    for imported in [module, *(alias.name for alias in node.names)]:
                        yield name, f"import {imported}", {}
                if isinstance(node, ast.Call):
                    given = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
                    yield name, ast.unparse(node.func), given


def test_nothing_reads_a_pickle_or_runs_a_string() -> None:
    seen = list(calls())
    assert len(seen) > 2000  # it looks at something
    for file, function, given in seen:
        where = f"{file}: {function}"
        assert function.removeprefix("import ").split(".")[0] not in PROGRAMS, where
        assert function not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), where
        assert given.get("trust_remote_code") in (None, False), where
        assert given.get("allow_pickle") in (None, False) and given.get("shell") in (None, False), where
        if function == "torch.load":
            assert given.get("weights_only") is True, where
    tokenizers = [given for _, function, given in seen if function.endswith("AutoTokenizer.from_pretrained")]
    assert tokenizers and all(given.get("trust_remote_code") is False for given in tokenizers)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FAKE.items():
        monkeypatch.setenv(name, value)


def test_tokens_are_blotted_out(planted: None) -> None:
    for name, value in FAKE.items():
        assert hide(f"a {value} b") == f"a <{name}> b"
        assert value not in hide(f"https://user:{value}@host")
    assert hide("hf_" + "x" * 34) == "<a token>"
    assert hide("hf_hub and a monkey") == "hf_hub and a monkey"


def test_short_values_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORT_KEY", "none")
    assert hide("none of it") == "none of it"


@pytest.mark.parametrize(
    "change",
    [{"run": "x-{}"}, {"previews": ["a", "b {}"]}, {"data": Data("set", trigger="{}")}, {"model": Model("{}")}],
)
def test_a_setting_that_holds_a_token_is_refused(planted: None, change: dict[str, Any]) -> None:
    text = FAKE["MY_SERVICE_SECRET"]

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(text)
        if isinstance(value, list):
            return [filled(item) for item in value]
        return replace(value, **{k: filled(v) for k, v in vars(value).items() if isinstance(v, str)})

    job = replace(Train(), **{name: filled(value) for name, value in change.items()})
    check_values(replace(job, **{name: getattr(Train(), name) for name in change}))
    with pytest.raises(ValueError, match=r"holds a token or key .*<MY_SERVICE_SECRET>") as caught:
        check_values(job)
    assert text not in str(caught.value)


def test_errors_and_tracebacks_hold_no_token(
    planted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for debug in ("0", "1"):
        monkeypatch.setenv("FLUX_DEBUG", debug)
        for error in (ValueError(f"x {FAKE['HF_TOKEN']}"), KeyError(FAKE["WANDB_API_KEY"])):
            with pytest.raises(SystemExit):
                try:
                    raise error
                except Exception as caught:
                    fail(caught, tmp_path)
    said = capsys.readouterr().err + (tmp_path / "traceback.txt").read_text()
    assert "<HF_TOKEN>" in said and "<WANDB_API_KEY>" in said and "Traceback" in said
    assert not any(value in said for value in FAKE.values())


def test_a_run_holds_no_token(
    planted: None, tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    make_style(tmp_path / "set", 4, seed=1)
    monkeypatch.chdir(tmp_path)
    train(
        Train(
            model=tiny,
            precision=Precision("bf16"),
            data=Data("set", 32, validation=0, cache="cache"),
            track=Track("wandb"),
            run="mine",
            steps=1,
            device="cpu",
        )
    )
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name.split(".")[0] for file in files} | {file.suffix for file in files}
    assert {"config", "metrics", "state", "pytorch_lora_weights", ".wandb"} <= names
    written = [(file, file.read_bytes()) for file in files] + [(Path("output"), "".join(capsys.readouterr()).encode())]
    for file, content in written:
        for name, value in FAKE.items():
            assert value.encode() not in content, f"{name} is in {file}"


def test_names_from_data_stay_in_the_runs_folder(
    tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    names = ["..png", "-rf.png", "%2e%2e%2fx.png", "a;touch x.png", "$(touch x).png", "a\nb.png", "CON.png", "~.png"]
    work.mkdir()
    (work / "set").mkdir()
    monkeypatch.chdir(work)
    lines = []
    for i, name in enumerate(n for n in names if not n.startswith(".")):
        Image.new("RGB", (40, 40), (20 * i, 9, 9)).save(work / "set" / name, "PNG")
        lines.append(json.dumps({"file_name": name, "text": f"<b>{i}</b>"}))
    (work / "set" / "metadata.jsonl").write_text("\n".join(lines))
    look(Look(model=tiny, data=Data("set", 32, validation=0, cache="cache"), run="mine", json=True))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == len(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert {path.name for path in work.iterdir()} - {"cache"} == {"runs", "set"}
    made = [str(file.relative_to(work)) for file in (work / "runs").rglob("*") if file.is_file()]
    assert sorted(made) == ["runs/mine/data.html", "runs/mine/data.json"]
    assert "<b>" not in (work / "runs" / "mine" / "data.html").read_text()
