"""What is remembered of files that were read: no second reading, and another one for whatever has changed."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.model import Model
from infer.family import flux1
from infer.program.remembered import NAME, Remembered, forget

TICK = 0.02  # seconds: longer than a tick of a file system's clock


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember files that were written a moment ago, as tests write them."""
    monkeypatch.setattr("infer.program.remembered.RECENT", -1.0)


def hashed(folder: Path, file: Path) -> bytes:
    remembered = Remembered(folder)
    value = remembered.sha256(file)
    remembered.save()
    return value


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("the file was read again")


def test_a_second_start_does_not_read_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as stream:
        stream.truncate(2**24)
    assert hashed(tmp_path, file) == hashlib.sha256(bytes(2**24)).digest()
    monkeypatch.setattr(hashlib, "file_digest", never)
    assert hashed(tmp_path, file) == hashlib.sha256(bytes(2**24)).digest()
    forget(tmp_path)
    with pytest.raises(AssertionError, match="read again"):
        hashed(tmp_path, file)


def _write(file: Path) -> None:
    file.write_bytes(b"two")


def _write_in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"two")


def _write_and_set_back(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def _through_a_link(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"two")
    file.unlink()
    file.symlink_to(other)


@pytest.mark.parametrize("change", [_write, _write_in_place, _write_and_set_back, _replace, _through_a_link])
def test_a_changed_file_of_the_same_size_is_read_again(change: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert hashed(tmp_path, file) == hashlib.sha256(b"one").digest()
    time.sleep(TICK)
    change(file)
    assert hashed(tmp_path, file) == hashlib.sha256(b"two").digest()


def test_what_was_changed_a_moment_ago_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.program.remembered.RECENT", 60.0)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    hashed(tmp_path, file)
    assert not (tmp_path / NAME).exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path) -> None:
    file, remembered = tmp_path / "weights", Remembered(tmp_path)
    file.write_bytes(b"one")

    def find() -> str:
        time.sleep(TICK)
        file.write_bytes(b"two")
        return "one"

    assert remembered.value(file, "what", find) == "one"
    assert remembered.value(file, "what", lambda: "two") == "two"


def test_writers_at_the_same_time_lose_nothing_of_each_other(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.bin" for i in range(24)]
    for file in files:
        file.write_bytes(file.name.encode())

    def write(own: list[Path]) -> None:
        remembered = Remembered(tmp_path)
        for file in own:
            remembered.value(file, f"by {own[0].name}", lambda: "right")
            remembered.save()

    # each file twice, by writers that find out different things of it
    threads = [threading.Thread(target=write, args=(files[i : i + 12],)) for i in (0, 6, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = json.loads((tmp_path / NAME).read_text())
    assert len(entries) == len(files)
    assert sum(len(entry["values"]) for entry in entries.values()) == 36


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"identity": 3, "values": {}}}'])
def test_a_memory_that_is_no_memory_is_begun_anew(content: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    (tmp_path / NAME).write_text(content)
    assert hashed(tmp_path, file) == hashlib.sha256(b"one").digest()
    assert json.loads((tmp_path / NAME).read_text()).keys() == {str(file)}


def test_what_is_gone_is_forgotten(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (one, two):
        file.write_bytes(b"x")
    hashed(tmp_path, one)
    one.unlink()
    hashed(tmp_path, two)
    assert json.loads((tmp_path / NAME).read_text()).keys() == {str(two)}
    with pytest.raises(FileNotFoundError):
        hashed(tmp_path, one)


def test_a_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.checkpoint.fingerprint.MEMORY", tmp_path)
    tiny = Model("scripts/tiny/model")
    first = [fingerprint(tiny, part) for part in flux1.PARTS]
    monkeypatch.setattr(hashlib, "file_digest", never)
    assert [fingerprint(tiny, part) for part in flux1.PARTS] == first
