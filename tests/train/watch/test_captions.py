"""Captions changed in place and changed back, wherever they stand: all else in the file stays byte for byte."""

import csv
import errno
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.train.watch.conftest import Served, serving
from train.data.dataset import Data
from train.data.samples import read_samples
from train.watch import captions
from train.watch.captions import list_pictures, undo, write_caption
from train.watch.places import RefusedError

CSV = (
    '\ufefffile_name,note,text\r\n"a.png",1,"a card, red\r\nand more"\r\nb.png,"say ""x""",a blue card\r\n'
    '\r\nsub/c.png,,"third"\r\n'
)
JSONL = (
    '\ufeff{"file_name": "a.png", "text": "a card, red\\r\\nand more", "x": 1}\r\n'
    '{"file_name":   "b.png", "text": ["a blue card", "sky"]}\r\n\n{"file_name": "sub/c.png", "text": "third"}'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "runs" / "set"
    (data / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        Image.new("RGB", (64, 64), (i * 40, 0, 0)).save(data / name)
    return data


def shown(folder: Path, name: str) -> list[str]:
    return next(one["captions"] for one in list_pictures(folder)["pictures"] if one["name"] == name)


@pytest.mark.parametrize(("file", "content"), [("metadata.csv", CSV), ("metadata.jsonl", JSONL)])
def test_one_piece_of_a_list_is_changed_and_changed_back(folder: Path, file: str, content: str) -> None:
    """Each picture in turn, with a caption that the form must be quoted for; training reads what was written."""
    listed = folder / file
    listed.write_bytes(content.encode())
    before = {name: shown(folder, name) for name in ("a.png", "b.png", "sub/c.png")}
    for name, was in before.items():
        new = [f'{name}: "new", with\na line and ä']
        write_caption(folder, name, was, new)
        samples, skipped = read_samples(Data(str(folder), validation=0.0))
        found = {sample.file.relative_to(folder).as_posix(): list(sample.captions) for sample in samples if sample.file}
        assert found == before | {name: new} and not skipped
        theirs, mine = content.splitlines(keepends=True), listed.read_bytes().decode().splitlines(keepends=True)
        kept = [line for line in theirs if line in mine]
        assert len(kept) >= len(theirs) - 2  # a record of two lines, at most
        with pytest.raises(RefusedError, match="was changed meanwhile"):
            write_caption(folder, name, was, ["of another page, which shows what was there"])
        assert undo(folder) == name and listed.read_bytes() == content.encode()
    with pytest.raises(RefusedError, match="no caption was changed here"):
        undo(folder)


def test_a_line_break_in_another_column_stays_within_its_cell(folder: Path) -> None:
    content = 'file_name,text,note\na.png,old,"first\nsecond"\nb.png,two,\nsub/c.png,three,"x\ry"\n'
    listed = folder / "metadata.csv"
    listed.write_bytes(content.encode())
    for name, was in (("a.png", "old"), ("sub/c.png", "three")):
        write_caption(folder, name, [was], ["new"])
        rows = list(csv.reader(io.StringIO(listed.read_bytes().decode(), newline="")))
        assert [len(row) for row in rows] == [3] * 4 and rows[1][2] == "first\nsecond" and rows[3][2] == "x\ry"
        assert shown(folder, name) == ["new"]
        assert undo(folder) == name and listed.read_bytes() == content.encode()


def test_a_caption_with_unicodes_line_separators_is_undone(folder: Path) -> None:
    (folder / "a.txt").write_text("old")
    write_caption(folder, "a.png", ["old"], ["new\u2028line\x85"])
    write_caption(folder, "a.png", shown(folder, "a.png"), ["newer"])
    assert [undo(folder), undo(folder)] == ["a.png"] * 2 and (folder / "a.txt").read_text() == "old"


def test_what_a_table_cannot_hold_is_refused(folder: Path) -> None:
    listed = folder / "metadata.csv"
    listed.write_text(CSV)
    before = listed.read_bytes()
    with pytest.raises(RefusedError, match=r"metadata.csv holds one caption a picture; write one"):
        write_caption(folder, "b.png", ["a blue card"], ["one", "two"])
    assert listed.read_bytes() == before
    listed.write_text('file_name,text\na.png,one\nb.png,"open\nsub/c.png,x\n')
    with pytest.raises(RefusedError, match=r"was changed meanwhile|is no CSV"):
        write_caption(folder, "a.png", ["one"], ["two"])
    assert listed.read_text().startswith("file_name,text\na.png,one")


def test_another_s_change_is_not_undone(folder: Path) -> None:
    listed = folder / "metadata.csv"
    listed.write_bytes(CSV.encode())
    write_caption(folder, "b.png", ["a blue card"], ["mine"])
    theirs = listed.read_bytes().replace(b"mine", b"theirs")
    listed.write_bytes(theirs)
    with pytest.raises(RefusedError, match="was changed meanwhile; nothing was written"):
        undo(folder)
    assert listed.read_bytes() == theirs


def test_a_full_disk_is_said_and_nothing_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = folder / "metadata.csv"
    listed.write_bytes(CSV.encode())
    real: Callable[..., None] = captions.replace_file

    def full(file: Path, save: Callable[[Path], object]) -> None:
        def stop(path: Path) -> None:
            save(path)
            raise OSError(errno.ENOSPC, "No space left on device")

        real(file, stop)

    for page in serving(folder.parents[1]):
        page: Served
        monkeypatch.setattr(captions, "replace_file", full)
        form = {"folder": "runs/set", "name": "b.png", "was": ["a blue card"], "captions": ["new"]}
        status, said = page.post("/api/caption", **form)
        assert status == 500 and "No space left on device" in said["error"] and "free some space" in said["error"]
        assert listed.read_bytes() == CSV.encode() and list(folder.glob(".*")) == []
        monkeypatch.setattr(captions, "replace_file", real)
        assert page.post("/api/caption", **form)[0] == 200
        # two pages at once: the other one shows what was there before
        for other in serving(folder.parents[1]):
            status, said = other.post("/api/caption", **form)
            assert status == 400 and "was changed meanwhile" in said["error"]
            assert other.post("/api/undo", folder="runs/set")[1] == {"undone": "b.png"}
        assert listed.read_bytes() == CSV.encode()
