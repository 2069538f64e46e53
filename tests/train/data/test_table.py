"""Parquet, arrow and saved data sets against the folder that they were made of."""

import io
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import Image

from infer.sample.picture import decode, pixel_hash
from train.data.dataset import Data
from train.data.samples import read_samples
from train.data.source import Sample, Source

COLUMNS = {"image_column": "photo", "caption_column": "words"}


def content(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (10 + seed, 12, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def write(file: Path, kind: str, captions: list[Any], pictures: list[bytes]) -> Path:
    """A table of the kind; the path that reads it."""
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    rows = {"photo": [{"bytes": b, "path": None} for b in pictures], "words": captions}
    if kind == "datasets":
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    elif kind == "saved":
        file = file.with_suffix("")
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(str(file))
    elif kind == "struct":
        pq.write_table(pa.table({"photo": [{"bytes": b, "path": "x"} for b in pictures], "words": captions}), file)
    elif kind == "arrow":
        file = file.with_suffix(".arrow")
        table = pa.table({"photo": pictures, "words": captions})
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(pa.table({"photo": pictures, "words": captions}), file)
        if kind == "folder":
            return file.parent
    return file


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {"cache": str(tmp_path / "cache"), **COLUMNS}


def read(path: Path, options: dict[str, Any]) -> list[Sample]:
    samples, skipped = read_samples(Data(str(path), **options))
    assert not skipped
    return samples


def hashes(samples: list[Sample]) -> list[str]:
    return [pixel_hash(decode(sample.read(), sample.name)) for sample in samples]


@pytest.mark.parametrize("kind", ["datasets", "struct", "bytes", "arrow", "saved", "folder"])
def test_a_table_gives_the_folders_samples(tmp_path: Path, data: dict[str, Any], kind: str) -> None:
    pictures, captions = [content(i) for i in range(3)], ["one", " two\n", "drei ß"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, caption in enumerate(captions):
        (folder / f"{i}.png").write_bytes(pictures[i])
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "tables").mkdir()
    samples = read(write(tmp_path / "tables" / "my set.parquet", kind, [*captions], pictures), data)
    beside = read(folder, {"cache": data["cache"]})
    assert [s.captions for s in samples] == [s.captions for s in beside] == [("one",), ("two",), ("drei ß",)]
    assert hashes(samples) == hashes(beside)
    assert samples[1].name.endswith("[1]")


def test_what_tables_or_folders_have_no_use_for_is_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    """Unless another source has: one of each is enough."""
    file, sidecars, listed = (
        write(tmp_path / "set.parquet", "bytes", ["a"], [content(0)]),
        tmp_path / "a",
        tmp_path / "b",
    )
    for folder in (sidecars, listed):
        folder.mkdir()
        (folder / "0.png").write_bytes(content(0))
    (sidecars / "0.txt").write_text("one\ntwo")
    (listed / "metadata.jsonl").write_text('{"file_name": "0.png", "words": "three"}')
    cache = {"cache": data["cache"]}
    for path, option, said in (
        (file, {"caption_lines": True, **COLUMNS}, "data.caption_lines is true, .*no source has one"),
        (listed, {"caption_lines": True, "caption_column": "words"}, "data.caption_lines is true, which has no effect"),
        (listed, {"image_column": "photo"}, "data.image_column is photo, .*no source is a table; .*leave it at image"),
        (sidecars, {"caption_column": "words"}, "data.caption_column is words, .*no source is a table or has a meta"),
    ):
        with pytest.raises(ValueError, match=said):
            read(path, cache | option)
    sources = [Source(str(path)) for path in (file, sidecars, listed)]
    samples, _ = read_samples(Data(sources=sources, caption_lines=True, **data))
    assert [sample.captions for sample in samples] == [("a",), ("one", "two"), ("three",)]


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path: Path, data: dict[str, Any]) -> None:
    file = write(tmp_path / "set.parquet", "bytes", ["abc", "def"], [content(0)] * 2)
    read(file, data)
    status = file.stat()
    write(file, "bytes", ["xyz", "def"], [content(0)] * 2)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert [sample.captions[0] for sample in read(file, data)] == ["xyz", "def"]


def test_several_captions_and_none(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "set.parquet"
    pq.write_table(pa.table({"photo": [content(0)] * 2, "words": [["a ", "b"], ["c"]]}), file)
    assert [sample.captions for sample in read(file, data)] == [("a", "b"), ("c",)]
    pq.write_table(pa.table({"photo": [content(0)] * 2}), file)
    samples, _ = read_samples(Data(sources=[Source(str(file), caption="a dog")], **data))
    assert [sample.captions for sample in samples] == [("a dog",)] * 2
    pq.write_table(pa.table({"photo": [content(0)] * 2, "words": ["x", None]}), file)
    samples, _ = read_samples(Data(sources=[Source(str(file), caption="a dog")], **data))
    assert [sample.captions for sample in samples] == [("x",), ("a dog",)]


def test_paths_in_a_table_stay_in_its_folder(tmp_path: Path, data: dict[str, Any]) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    for place in (inside / "a.png", tmp_path / "secret.png"):
        place.write_bytes(content(0))
    (inside / "link.png").symlink_to("../secret.png")
    names = ["a.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", str(inside / "a.png"), "gone.png"]
    table = pa.table({"photo": [{"bytes": None, "path": name} for name in names], "words": ["x"] * len(names)})
    pq.write_table(table, inside / "set.parquet")
    samples = read(inside / "set.parquet", data)
    assert samples[0].read() == samples[4].read() == content(0)
    for i in (1, 2, 3):
        with pytest.raises(ValueError, match=rf"set.parquet\[{i}\] names '.*secret.png|link.png', outside its folder"):
            samples[i].read()
    with pytest.raises(ValueError, match=r"set.parquet\[5\] cannot be read as a picture.*take it out"):
        samples[5].read()


def test_a_data_set_of_the_hub(tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, with its columns, subset and split; pictures as bytes, or as files that were downloaded."""
    hub, asked = tmp_path / "hub", []
    hub.mkdir()
    for place in (hub / "a.png", tmp_path / "secret.png"):
        place.write_bytes(content(1))

    def load(*given: Any, **options: Any) -> datasets.Dataset:
        asked.append((given, options))
        stored = [{"bytes": content(0), "path": "x.png"}, *({"bytes": None, "path": str(p)} for p in files)]
        features = datasets.Features({"photo": datasets.Image(), "words": datasets.List(datasets.Value("string"))})
        return datasets.Dataset.from_dict({"photo": stored, "words": [["a", "b"], ["c"], ["d"]]}, features=features)

    files = [hub / "a.png", tmp_path / "secret.png"]
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(hub))
    source = Source("owner/name", subset="small", split="train[:3]")
    samples, _ = read_samples(Data(sources=[source], **data))
    assert asked == [(("owner/name", "small"), {"split": "train[:3]"})]
    assert [sample.captions for sample in samples] == [("a", "b"), ("c",), ("d",)]
    assert [sample.name for sample in samples] == [f"owner/name[{i}]" for i in range(3)]
    assert samples[0].read() == content(0) and samples[1].read() == content(1)
    with pytest.raises(ValueError, match=r"owner/name\[2\] names .*secret.png', outside its folder"):
        samples[2].read()
    with pytest.raises(ValueError, match="owner/name has no column 'image', only photo, words"):
        read_samples(Data(sources=[Source("owner/name")], cache=data["cache"]))


def test_a_downloaded_data_set_keeps_its_splits_and_subsets(tmp_path: Path, data: dict[str, Any]) -> None:
    """The layout of the Hub: files in folders, splits by their names, subsets by the README."""
    for name, captions in (
        ("data/train-00000-of-00002.parquet", ["a", "b"]),
        ("data/train-00001-of-00002.parquet", ["c"]),
        ("data/test-00000-of-00001.parquet", ["d"]),
        (".cache/old.parquet", ["e"]),
    ):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "set" / name, "bytes", captions, [content(0)] * len(captions))
    (tmp_path / "set/README.md").write_text("---\nlicense: mit\n---\nwords\n")
    assert [sample.captions for sample in read(tmp_path / "set", data)] == [("a",), ("b",), ("c",)]

    def captions_of(**options: Any) -> list[str]:
        samples, _ = read_samples(Data(sources=[Source(str(tmp_path / "set"), **options)], **data))
        return [sample.captions[0] for sample in samples]

    assert captions_of(split="test") == ["d"]
    with pytest.raises(ValueError, match="datasets cannot load it: Unknown split"):
        captions_of(split="validation")
    (tmp_path / "set/more").mkdir()
    write(tmp_path / "set/more/train-0.parquet", "bytes", ["f"], [content(0)])
    subsets = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("data", "more")
    )
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    assert captions_of(subset="more") == ["f"] and captions_of(subset="data") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="datasets cannot load it: Config name is missing"):
        captions_of()


def test_pictures_beside_tables_are_not_left_out(tmp_path: Path, data: dict[str, Any]) -> None:
    write(tmp_path / "set.parquet", "bytes", ["a"], [content(0)])
    (tmp_path / "a.png").write_bytes(content(1))
    for nested in ("", "deep", "deep/deeper"):
        place = tmp_path / nested
        place.mkdir(exist_ok=True)
        (tmp_path / "set.parquet").rename(place / "set.parquet")
        with pytest.raises(
            ValueError, match=r" holds pictures beside tables \(.*set.parquet\); put them in folders of"
        ):
            read(tmp_path, data)
        (place / "set.parquet").rename(tmp_path / "set.parquet")
    (tmp_path / "a.png").unlink()
    write(tmp_path / "other.arrow", "arrow", ["b"], [content(0)])
    with pytest.raises(ValueError, match=" holds both parquet and arrow files; put them in folders of their own"):
        read(tmp_path, data)


def test_tables_are_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "set.parquet"

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            read_samples(Data(**{"path": str(file)} | data | options))

    refused("set.parquet' does not exist; give a .parquet file that does")
    good = content(0)
    write(file, "struct", ["a", "b"], [good, good[:300]])
    refused("has no column 'text', only photo, words; set data.image_column", caption_column="text")
    refused("only the pictures of a folder can have masks", masks=str(tmp_path))
    refused("datasets cannot load it", path="", sources=[Source(str(file), split="test")])
    refused(
        "subset of .*set.parquet is 'small', but that has none", path="", sources=[Source(str(file), subset="small")]
    )
    datasets.Dataset.from_dict({"photo": ["x"], "words": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    source = Source(str(tmp_path / "saved"), split="test")
    refused("it has no splits, but split is 'test'; leave that out", path="", sources=[source])
    pq.write_table(pa.table({"words": ["a", "b"], "number": [1, 2]}), file)
    refused("column 'number' of .*set.parquet holds no pictures.*set data.image_column", image_column="number")
    with pytest.raises(ValueError, match=r"set.parquet\[0\] cannot be read as a picture"):
        read(file, data | {"image_column": "words"})[0].read()
    write(file, "struct", ["a", "b"], [good, good[:300]])
    samples = read(file, data)
    with pytest.raises(ValueError, match=r"set.parquet\[1\] cannot be read as a picture.*take it out"):
        decode(samples[1].read(), samples[1].name)
    pq.write_table(pa.table({"photo": [good, None], "words": ["a", "b"]}), file)
    with pytest.raises(ValueError, match=r"set.parquet\[1\] cannot be read as a picture \(there is none"):
        read(file, data)[1].read()
    write(file, "struct", ["a", None], [good, good])
    refused(r"set.parquet\[1\] has None as words, not text.*set data.caption_column")
    samples, skipped = read_samples(Data(str(file), on_error="skip", **data))
    assert len(samples) == 1 and skipped[0].name.endswith("set.parquet[1]")
    write(file, "struct", ["a", " "], [good, good])
    refused(r"set.parquet\[1\] has an empty caption")
    file.write_bytes(b"no parquet")
    refused("set.parquet.*datasets cannot load it.*check the spelling")
