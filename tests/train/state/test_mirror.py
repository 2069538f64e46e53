"""A run's folder in the cloud: copied while it changes, brought back where it is gone, by fsspec's file systems."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.memory_cloud import RefusedError, emptied
from train.state import mirror
from train.state.mirror import bring_back, copy_changed, mirrored

cloud = pytest.fixture(emptied, name="cloud")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/step-000010/adapter.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def there(cloud: MemoryFileSystem, root: str = "/bucket/mine") -> dict[str, bytes]:
    return {name.removeprefix(f"{root}/"): cloud.cat_file(name) for name in cloud.find(root)}


def here(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(
    cloud: MemoryFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}
    copy_changed(cloud, "/bucket/mine", run, sent)
    assert there(cloud) == here(run)
    put, uploads = MemoryFileSystem.put_file, []

    def counted(self: MemoryFileSystem, local: str, path: str, **options: Any) -> None:
        uploads.append(Path(local).name)
        put(self, local, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counted)
    copy_changed(cloud, "/bucket/mine", run, sent)
    assert uploads == []
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("more")
    shutil.move(run / "checkpoints" / "step-000010", run / "checkpoints" / "step-000020")
    (run / "checkpoints" / ".step-000030.partial").mkdir()
    (run / "checkpoints" / ".step-000030.partial" / "half").write_text("half")
    copy_changed(cloud, "/bucket/mine", run, sent)
    assert sorted(uploads) == ["adapter.safetensors", "metrics.jsonl"]
    assert there(cloud) == {name: body for name, body in here(run).items() if "partial" not in name}


def test_a_machine_that_is_taken_away(cloud: MemoryFileSystem, run: Path) -> None:
    before = here(run)
    with pytest.raises(SystemExit), mirrored("memory://bucket", "mine", run):
        (run / "previews").mkdir()
        (run / "previews" / "a.png").write_bytes(b"picture")
        raise SystemExit(3)  # as a signal ends it
    assert there(cloud) == here(run) == before | {"previews/a.png": b"picture"}
    shutil.rmtree(run)
    with mirrored("memory://bucket", "mine", run):
        assert here(run) == there(cloud)
        (run / "metrics.jsonl").write_text("newer")
    assert there(cloud)["metrics.jsonl"] == b"newer"
    shutil.rmtree(run / "previews")
    with mirrored("memory://bucket", "mine", run):  # the run is here: nothing is brought back
        assert not (run / "previews").exists()


def test_a_run_that_went_on_elsewhere_is_not_copied_over(cloud: MemoryFileSystem, run: Path) -> None:
    copy_changed(cloud, "/bucket/mine", run, {})
    cloud.pipe("/bucket/mine/checkpoints/step-000020/adapter.safetensors", b"further")
    before = there(cloud)
    with (
        pytest.raises(ValueError, match=r"holds step 20 of this run and .*mine step 10 at most: it has gone on els"),
        mirrored("memory://bucket", "mine", run),
    ):
        pass
    assert there(cloud) == before
    shutil.rmtree(run)
    with mirrored("memory://bucket", "mine", run):
        assert here(run) == before


def test_it_is_copied_while_it_trains(cloud: MemoryFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "EVERY", 0.01)
    import time

    with mirrored("memory://bucket", "mine", run):
        waited = time.monotonic()
        while "config.yaml" not in there(cloud) and time.monotonic() - waited < 20:
            time.sleep(0.01)
        assert "config.yaml" in there(cloud)


def test_a_cloud_that_fails_stops_no_training(
    cloud: MemoryFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RefusedError("quota exceeded")

    monkeypatch.setattr(MemoryFileSystem, "put_file", full)
    monkeypatch.setattr(MemoryFileSystem, "find", full)
    with mirrored("memory://bucket", "mine", run):
        pass
    assert "could not be copied to memory://bucket (quota exceeded)" in capsys.readouterr().err


def test_what_cannot_be_brought_back(cloud: MemoryFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_changed(cloud, "/bucket/mine", run, {})
    shutil.rmtree(run)

    def broken(*args: Any, **options: Any) -> None:
        raise RefusedError("connection lost")

    monkeypatch.setattr(MemoryFileSystem, "get_file", broken)
    with pytest.raises(ValueError, match=r"brought back from mirror memory://bucket \(connection lost\); mend"):
        bring_back(cloud, "/bucket/mine", run, "memory://bucket")
    with (
        pytest.raises(ValueError, match=r"s3://bucket is read by s3fs, which is not installed: pip install s3fs"),
        mirrored("s3://bucket", "mine", run),
    ):
        pass


def test_a_folder_of_this_machine(run: Path, tmp_path: Path) -> None:
    with mirrored(f"file://{tmp_path}/elsewhere", "mine", run):
        pass
    assert here(tmp_path / "elsewhere" / "mine") == here(run)
    before = here(run)
    shutil.rmtree(run)
    with mirrored(f"file://{tmp_path}/elsewhere", "mine", run):
        assert here(run) == before


def test_other_ranks_copy_nothing(cloud: MemoryFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with mirrored("memory://bucket", "mine", run):
        pass
    assert there(cloud) == {}
