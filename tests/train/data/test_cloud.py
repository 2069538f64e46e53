"""Folders in the cloud: what is copied, what is left alone, and what is said, by fsspec's file systems of memory and of
this machine."""

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from tests.memory_cloud import RefusedError, emptied
from train.data.cloud import is_cloud, local_copy
from train.data.dataset import Data
from train.data.samples import read_samples
from train.data.source import Source

bucket = pytest.fixture(emptied, name="bucket")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is downloaded, in any order."""
    done: list[str] = []
    get = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, path: str, local: str, **options: Any) -> None:
        done.append(path.rpartition("/")[2])
        get(self, path, local, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return done


def pictures(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (i, 90, 90)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"picture {i}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_addresses() -> None:
    for path in ("s3://a/b", "gs://a", "hf://datasets/a/b", "memory://a", "file:///a"):
        assert is_cloud(path)
    for path in ("a/b", "/a/b", "https://huggingface.co/a/b", "s3:/a", "C://", "a b://c", "s3://"):
        assert not is_cloud(path)


def test_a_folder_is_read_as_its_local_twin(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    twin = pictures(tmp_path / "twin", "a.png", "deep/er/b.png", "日本/ñ.png")
    bucket.put(str(twin), "/set", recursive=True)
    here, skipped = read_samples(Data(str(twin), cache=str(tmp_path / "cache")))
    there, also_skipped = read_samples(Data("memory://set", cache=str(tmp_path / "cache")))
    assert not skipped and not also_skipped and len(here) == 3
    assert [(one.read(), one.captions) for one in here] == [(one.read(), one.captions) for one in there]


def test_only_what_changed_is_downloaded(bucket: MemoryFileSystem, downloads: list[str], tmp_path: Path) -> None:
    bucket.put(str(pictures(tmp_path / "twin", "a.png", "b/c.png")), "/set", recursive=True)
    copy = local_copy("memory://set", tmp_path / "cache", "data.path")
    assert contents(copy) == contents(tmp_path / "twin") and len(downloads) == 4
    downloads.clear()
    assert local_copy("memory://set/", tmp_path / "cache", "data.path") == copy and downloads == []
    bucket.pipe("/set/a.txt", b"another caption")
    bucket.pipe("/set/new.txt", b"new")
    bucket.rm("/set/b/c.txt")
    (copy / "a.png").unlink()  # by somebody here
    assert local_copy("memory://set", tmp_path / "cache", "data.path") == copy
    assert sorted(downloads) == ["a.png", "a.txt", "new.txt"]
    assert contents(copy).keys() == {"a.png", "a.txt", "new.txt", "b/c.png"}
    assert (copy / "a.txt").read_bytes() == b"another caption"


def test_a_download_that_breaks_off_goes_on(
    bucket: MemoryFileSystem, downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i:02}.txt" for i in range(40)]
    for name in names:
        bucket.pipe(f"/set/{name}", name.encode())
    get = MemoryFileSystem.get_file

    def breaking(self: MemoryFileSystem, path: str, local: str, **options: Any) -> None:
        if path.endswith("/25.txt"):
            Path(local).write_bytes(b"2")
            raise RefusedError("connection lost")
        get(self, path, local, **options)

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "get_file", breaking)
        with pytest.raises(ValueError, match=r"25\.txt cannot be downloaded \(connection lost\); run it again"):
            local_copy("memory://set", tmp_path / "cache", "data.path")
    before = len(downloads)
    copy = local_copy("memory://set", tmp_path / "cache", "data.path")
    assert len(downloads) - before <= 15 and contents(copy) == {name: name.encode() for name in names}


def test_without_a_network_a_whole_copy_is_used(
    bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.pipe("/set/a.txt", b"a")
    copy = local_copy("memory://set", tmp_path / "cache", "data.path")

    def gone(*args: Any, **options: Any) -> None:
        raise RefusedError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "find", gone)
    assert local_copy("memory://set", tmp_path / "cache", "data.path") == copy
    assert "memory://set cannot be reached (no route to host); its copy in" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.path memory://other cannot be listed \(no route to host\); check"):
        local_copy("memory://other", tmp_path / "cache", "data.path")


def test_a_single_file_and_several_sources(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    bucket.pipe("/tables/set.parquet", b"rows")
    copy = local_copy("memory://tables/set.parquet", tmp_path / "cache", "data.path")
    assert copy.name == "set.parquet" and copy.read_bytes() == b"rows"
    twin = pictures(tmp_path / "twin", "a.png", "b.png")
    sources = [Source(f"file://{twin}"), Source(str(shutil.copytree(twin, tmp_path / "second")))]
    found, _ = read_samples(Data(sources=sources, cache=str(tmp_path / "cache")))
    assert [one.source for one in found] == [0, 0, 1, 1]


def test_references_in_the_cloud(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    after, before = pictures(tmp_path / "after", "a.png", "b.png"), pictures(tmp_path / "before", "b.png", "a.png")
    bucket.put(str(before), "/before", recursive=True)
    found, _ = read_samples(Data(str(after), references=["memory://before"], cache=str(tmp_path / "cache")))
    said = [(Path(one.name).name, one.references[0].read()) for one in found]
    assert said == [(name, (before / name).read_bytes()) for name in ("a.png", "b.png")]


def test_what_cannot_be_copied(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    for address, said in (
        ("memory://nothing", r"data\.path memory://nothing holds no files, or is not there; check the spelling"),
        ("nosuch://a/b", r"data\.path nosuch://a/b is of no file system that fsspec knows"),
        ("s3://bucket/set", r"data\.path s3://bucket/set is read by s3fs, which is not installed: pip install s3fs"),
    ):
        with pytest.raises(ValueError, match=said):
            read_samples(Data(address, cache=str(tmp_path / "cache")))
    bucket.store["/set/../../../evil.txt"] = bucket.store.setdefault("/set/a.txt", MemoryFile(b"a"))
    with pytest.raises(ValueError, match="whose name leaves its folder; rename it"):
        local_copy("memory://set", tmp_path / "cache", "data.path")
    assert not list(tmp_path.rglob("evil.txt"))


def MemoryFile(content: bytes) -> Any:  # noqa: N802
    fsspec.filesystem("memory").pipe("/made", content)
    return fsspec.filesystem("memory").store.pop("/made")
