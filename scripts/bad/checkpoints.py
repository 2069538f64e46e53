"""Runs whose files are damaged, through train.py, which resumes what is whole and refuses what it cannot go on from."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.bad.case import Case, good

RUN = ["run=mine", "data.path=set", "data.resolution=64", "data.validation=0", "device=cpu", "steps=1", "previews=[]",
       "adapter.rank=2", "save_every=1"]  # fmt: skip
CLAIMED = r"run 'mine' exists with another config|runs/mine/config.yaml"


def begun(folder: Path) -> Path:
    """A run that has a checkpoint folder, as record_config() sees it."""
    good(folder / "set")
    run = folder / "runs" / "mine"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    return run


def config(name: str, content: bytes, said: str = CLAIMED) -> Case:
    def make(folder: Path) -> list[str]:
        (begun(folder) / "config.yaml").write_bytes(content)
        return RUN

    return Case("checkpoint", f"config.yaml: {name}", make, said, "train")


def one(name: str, prepare: Callable[[Path], Any], said: str, *more: str) -> Case:
    def make(folder: Path) -> list[str]:
        good(folder / "set")
        prepare(folder)
        return [*RUN, *more]

    return Case("checkpoint", name, make, said, "train")


def _runs_is_file(folder: Path) -> None:
    (folder / "runs").write_text("")


def _run_is_file(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "mine").write_text("")


def _config_is_folder(folder: Path) -> None:
    (folder / "runs" / "mine" / "config.yaml").mkdir(parents=True)


def _adapter(content: bytes) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        file = folder / "runs" / "mine" / "adapter" / "pytorch_lora_weights.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)

    return prepare


def _frame(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def cases() -> Iterator[Case]:
    for name, content in (
        ("empty", b""),
        ("a list", b"[1, 2]\n"),
        ("a number", b"3\n"),
        ("text", b"hello\n"),
        ("no YAML", b"a: [1\n"),
        ("no UTF-8", b"a: \xff\xfe\n"),
        ("a tab", b"a:\n\t- b\n"),
        ("a program", b"a: !!python/object/apply:os.system ['touch runs-partial-was-run']\n"),
        ("an anchor to nowhere", b"a: *nowhere\n"),
        ("another run's", b"seed: 3\nsteps: 77\nprocesses: 1\n"),
        ("no processes", b"seed: 3\n"),
        ("processes that are text", b"processes: many\n"),
        ("null", b"null\n"),
        ("NUL", b"a: \0\n"),
        ("nested too deep", b"[" * 3000),
    ):
        yield config(name, content)
    yield one("runs is a file", _runs_is_file, "runs")
    yield one("the run's folder is a file", _run_is_file, "runs/mine")
    yield one("config.yaml is a folder", _config_is_folder, "config.yaml")
    for name, content in (
        ("empty", b""),
        ("text", b"this is no adapter"),
        ("a header of 2^63 bytes", b"\0\0\0\0\0\0\0\x80{}"),
        ("no JSON", b"\x01\0\0\0\0\0\0\0{"),
        ("notes that are no JSON", _frame({"__metadata__": {"flux_lora": "{"}})),
        ("notes that are a list", _frame({"__metadata__": {"flux_lora": "[]"}})),
        ("notes that are a number", _frame({"__metadata__": {"flux_lora": "3"}})),
    ):
        yield one(f"the finished adapter: {name}", _adapter(content), "pytorch_lora_weights.safetensors")
