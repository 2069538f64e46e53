"""--help of every command: every setting with its default, quick, whole or cut off by a reader that stops."""

import os
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import psutil
import pytest

from infer.program.docstrings import field_docs
from infer.program.help import first_sentence, groups_of
from infer.program.paths import ROOT
from scripts.settings_page import PAGE, commands, page
from train.estimate.plan import Plan

ENTRIES = commands()


def test_the_page_of_all_settings_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python scripts/settings_page.py"


@pytest.mark.parametrize("schema", [each[2] for each in ENTRIES], ids=lambda schema: schema.__name__)
def test_every_setting_is_explained(schema: Any) -> None:
    for group in groups_of(schema):
        docs = field_docs(group.kind)
        assert set(group.settings) <= docs.keys() and all(docs[name].endswith(".") for name in group.settings)
        assert {each.name for each in fields(group.kind)} == {
            *group.settings,
            *(name for name, kind in get_type_hints(group.kind).items() if is_dataclass(kind)),
        }


def test_texts_below_inherited_fields_count() -> None:
    docs = field_docs(Plan)
    assert docs["fit_gib"].startswith("Size of a card") and docs["steps"].startswith("Optimizer updates.")


def test_the_first_sentence() -> None:
    assert first_sentence("Learn it (Liu et al. 2024); slower.\n  Not with x.") == "Learn it (Liu et al. 2024); slower."


@pytest.mark.parametrize("file, config, schema", ENTRIES, ids=lambda each: each.name if isinstance(each, Path) else "")
def test_help_has_a_line_for_each_setting(file: Path, config: str, schema: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, ROOT / file, "--help"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        text = run.stdout.read()
        used = psutil.Process(run.pid).cpu_times() if psutil.pid_exists(run.pid) else None
    assert run.returncode == 0 and used is not None
    assert used.user < 3 or time.monotonic() - began < 3  # seconds; beside other work
    lines = [line.split("=")[0].strip() for line in text.splitlines()]
    for group in groups_of(schema):
        for name in group.settings:
            assert lines.count(f"{group.name}.{name}".lstrip(".")) == 1, name
    assert text.startswith("usage: python ") and "Traceback" not in text


def test_help_shows_what_was_typed_and_of_a_sweep_too(tmp_path: Path) -> None:
    for words in (["experiment=dev_8gb", "run=läufe", "--help"], ["-m", "experiment=dev_8gb", "run=läufe", "-h"]):
        text = subprocess.run(
            [sys.executable, ROOT / "train/train.py", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        assert "\n  memory.budget_gib=6.0 " in text and "\n  run=läufe " in text


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, ROOT / "train/train.py", "--help"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
