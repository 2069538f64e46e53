"""Which reference belongs to which picture: folders, metadata and tables."""

import io
import json
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.buckets import cut, reference_view, views_of
from train.data.dataset import Data
from train.data.samples import read_samples
from train.data.source import Sample, Source
from train.data.view import View

SPELLINGS = {  # of a picture's name, what its reference may be called
    "same": lambda stem, end: stem + end,
    "capitals": lambda stem, end: stem + end.upper(),
    "composed otherwise": lambda stem, end: unicodedata.normalize("NFD", stem) + end,
    "another ending": lambda stem, end: stem + (".webp" if end != ".webp" else ".png"),
}
STEM = st.text(st.sampled_from("abcäß漢é01-_ ."), min_size=1, max_size=6).filter(
    lambda stem: stem[0] not in ". " and stem[-1] not in ". " and ".." not in stem
)


def stems(sample: Sample) -> list[bytes]:
    return [reference.read() for reference in sample.references]


@settings(max_examples=40)
@given(
    st.lists(STEM, min_size=1, max_size=8, unique_by=lambda stem: unicodedata.normalize("NFC", stem).casefold()),
    st.data(),
)
def test_a_reference_is_the_file_of_its_pictures_name(names: list[str], data: st.DataObject) -> None:
    """However it is spelled, whatever the folder's order, with one folder and with two."""
    count = data.draw(st.integers(1, 2))
    with TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("after", *(f"before{k}" for k in range(count))):
            (folder / name).mkdir()
        for i, stem in enumerate(names):
            end = data.draw(st.sampled_from([".png", ".jpg", ".webp"]))
            (folder / "after" / (stem + end)).write_bytes(f"picture {i}".encode())
            (folder / "after" / f"{stem}.txt").write_text(f"caption {i}")
            for k in range(count):
                spelled = SPELLINGS[data.draw(st.sampled_from(sorted(SPELLINGS)))](stem, end)
                (folder / f"before{k}" / spelled).write_bytes(f"reference {i} {k}".encode())
        given_folders = [str(folder / f"before{k}") for k in range(count)]
        samples, skipped = read_samples(Data(str(folder / "after"), references=given_folders))
        assert not skipped and len(samples) == len(names)
        for sample in samples:
            i = int(sample.captions[0].removeprefix("caption "))
            assert sample.read() == f"picture {i}".encode()
            assert stems(sample) == [f"reference {i} {k}".encode() for k in range(count)]


@settings(max_examples=60)
@given(
    st.integers(33, 200), st.integers(33, 200), st.sampled_from([32, 48, 64]), st.integers(1, 4), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_what_is_at_one_place_in_both_stays_there(
    width: int, height: int, resolution: int, crops: int, flip: bool, seed: int
) -> None:
    """The reference is the picture's negative: cut alike, the two add up to nothing wherever one looks."""
    import numpy as np

    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    negative = picture.point(lambda value: 255 - value)
    data = Data(resolution=resolution, crops=crops, flip=flip)
    for view in views_of(width, height, data)[0]:
        own = reference_view(negative.size, picture.size, view, resolution, data)
        total = cut(picture, view) + cut(negative, own)
        assert total.abs().max() <= 2.01 / 127.5  # each is rounded by itself


def test_a_reference_of_its_own_size_is_the_middle_and_mirrored_with_its_picture() -> None:
    data, view = Data(resolution=64), View(64, 64, (10.0, 0.0, 74.0, 64.0), True)
    assert reference_view((90, 64), (90, 64), view, 64, data) == view
    own = reference_view((64, 128), (90, 64), view, 64, data)
    assert (own.width, own.height) == (32, 128 // 16 * 16) or own.width * own.height <= 64**2
    assert own.flip and own.box[0] + own.box[2] == 64 and own.box[1] + own.box[3] == 128
    other = reference_view((90, 64), (90, 64), view, 64, Data(resolution=64, reference_resolution=32))
    assert other.width * other.height <= 32**2 and other.flip


def picture(file: Path, colour: str) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(file)
    return file.read_bytes()


def test_metadata_names_references_and_what_it_names_is_no_sample(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "before/r.png", "red"), picture(tmp_path / "before/b.png", "blue")
    for name in ("one.png", "two.png", "three.png", "four.png"):
        picture(tmp_path / name, "white")
    lines = [
        {"file_name": "one.png", "text": "a", "references": ["before/r.png"]},
        {"file_name": "two.png", "text": "b", "references": ["before/B.png".lower(), "before/r.png"]},
        {"file_name": "three.png", "text": "c"},
        {"file_name": "four.png", "text": "d", "references": ["one.png"]},  # both a sample and a reference
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples, _ = read_samples(Data(str(tmp_path)))
    found = {Path(sample.name).name: stems(sample) for sample in samples}
    assert found == {
        "one.png": [red], "two.png": [blue, red], "three.png": [], "four.png": [(tmp_path / "one.png").read_bytes()]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["gone.png"], r"one\.png has the reference 'gone\.png', which is not in"),
        (["../x.png"], r"names '\.\./x\.png', outside its folder"),
        ([3], "is not right: references is a list of pictures"),
        (["r.png"] * 11, "names 11 references; a picture has 10 at most"),
        (["R.PNG"], r"has the reference 'R\.PNG', which is not in .*did you mean 'r\.png'"),
    ],
)
def test_metadata_that_is_wrong(references: list[object], message: str, tmp_path: Path) -> None:
    for name in ("one.png", "r.png"):
        picture(tmp_path / name, "red")
    line = {"file_name": "one.png", "text": "a", "references": references}
    other = {"file_name": "r.png", "text": "b"}
    (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(other)}")
    with pytest.raises(ValueError, match=message):
        read_samples(Data(str(tmp_path)))


def test_a_missing_or_spare_reference_is_said_and_folders_within_are_no_samples(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png", "white")
        (tmp_path / f"{name}.txt").write_text(name)
    picture(tmp_path / "before/a.png", "red")
    picture(tmp_path / "before/c.png", "red")
    data = Data(str(tmp_path), references=[str(tmp_path / "before")], on_error="skip")
    samples, skipped = read_samples(data)
    assert [sample.captions for sample in samples] == [("a",)]
    said = {Path(one.name).name: one.reason for one in skipped}
    assert said["c.png"].startswith("is the reference of no picture") and said["b.png"].startswith(
        "has no reference in"
    )
    (tmp_path / "before/c.png").rename(tmp_path / "before/b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a", "references": ["b.png"]}\n{"file_name": "b.png", "text": "b"}'
    )
    with pytest.raises(ValueError, match=r"a\.png has references in its folder's metadata, and .*before is given too"):
        read_samples(Data(str(tmp_path), references=[str(tmp_path / "before")]))


def test_columns_of_a_table_and_null_is_none(tmp_path: Path) -> None:
    import datasets

    def png(colour: str) -> dict[str, object]:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = {
        "image": [png("white"), png("grey"), png("black")],
        "before": [png("red"), None, png("blue")],
        "style": [None, None, png("pink")],
        "text": ["a", "b", "c"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set.parquet")
    source = Source(str(tmp_path / "set.parquet"), references=["before", "style"])
    samples, _ = read_samples(Data(sources=[source], cache=str(tmp_path / "cache")))
    wanted = [["red"], [], ["blue", "pink"]]
    for sample, colours in zip(samples, wanted, strict=True):
        assert stems(sample) == [png(colour)["bytes"] for colour in colours]
    with pytest.raises(ValueError, match=r"has no column 'after', only .*data\.references"):
        read_samples(Data(sources=[Source(source.path, references=["after"])], cache=str(tmp_path / "cache")))
