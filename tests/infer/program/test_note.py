"""Notes beside a progress bar: a line of their own, once, of the first rank alone."""

import sys

import pytest
from tqdm import tqdm

from infer.program.note import note


def test_a_note_has_its_own_line_above_a_bar_that_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    note.cache_clear()
    with tqdm(total=2, desc="draw", file=sys.stderr, mininterval=0) as bar:
        bar.update()
        for _ in range(2):
            note("this file was rounded already")
        bar.update()
    said = capsys.readouterr().err
    # what stands in its line before is overwritten with spaces
    before, after = said.split("note: this file was rounded already\n")
    assert not before.rpartition("\r")[2] and not before.rpartition("\r")[0].rpartition("\r")[2].strip()
    assert "draw: 100%" in after


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    note.cache_clear()
    monkeypatch.setenv("RANK", "1")
    note("said once a machine")
    assert not capsys.readouterr().err
