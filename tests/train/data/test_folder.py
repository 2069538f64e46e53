"""Captions against the pictures they were written for, and every way to name, hide or link a file."""

import csv
import io
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infer.sample.picture import decode
from train.data import image_folder
from train.data.dataset import Data
from train.data.samples import read_samples
from train.data.source import Sample, Skipped, Source

NAMES = ("a.png", "with space/b c.PNG", "deep/er/a.jpg", "日本/ñandú 🦩.webp", "x.y.z.bmp", "a.tiff")


def colour(i: int) -> tuple[int, int, int]:
    return (20 + 40 * i, 250 - 30 * i, 90)


def put(file: Path, picture: Image.Image | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("RGB", (20, 16), colour(0))).save(file)
    return file


def caption_of(i: int) -> str:
    return f'picture {i}: "gläss"\u2028and\tτίλντα, [{i}]'


def samples_of(folder: Path, **options: Any) -> list[Sample]:
    samples, skipped = read_samples(Data(str(folder), **options))
    assert not skipped
    return samples


def check(samples: list[Sample], names: tuple[str, ...] = NAMES) -> None:
    """Each sample's caption says the number whose colour its picture has."""
    assert len(samples) == len(names)
    for sample in samples:
        i = next(i for i, name in enumerate(names) if sample.name.endswith(f"/{name}"))
        assert sample.captions == (caption_of(i),)
        pixels = np.asarray(decode(sample.read(), sample.name)).astype(int)
        assert np.abs(pixels - colour(i)).max() < 6  # JPEG and WebP round


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", ".txt", ".caption"])
def test_captions_stay_with_their_pictures(tmp_path: Path, kind: str, mark: str) -> None:
    for i, name in enumerate(NAMES):
        put(tmp_path / name, Image.new("RGB", (20, 16), colour(i)))
        if kind.startswith(".") and name != "a.tiff":
            (tmp_path / name).with_suffix(kind).write_text(f"{mark} {caption_of(i)}\n", encoding="utf-8")
    if kind.startswith("."):
        (tmp_path / "a.tiff").unlink()  # a.png has a.txt already
        check(samples_of(tmp_path), NAMES[:-1])
        return
    rows = [{"other": "1", "words": f" {caption_of(i)}", "file_name": name} for i, name in enumerate(NAMES)]
    seen = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        if kind == "jsonl":
            lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
            text = "\r\n\n".join(lines)
        else:
            stream = io.StringIO()
            writer = csv.DictWriter(stream, ["other", "words", "file_name"])
            writer.writeheader()
            writer.writerows(rows)
            text = stream.getvalue()
        (tmp_path / f"metadata.{kind}").write_text(mark + text, encoding="utf-8", newline="")
        samples = samples_of(tmp_path, caption_column="words")
        check(samples)
        seen.append([sample.name for sample in samples])
    assert seen[0] == seen[1] == seen[2]


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=4), st.booleans())
def test_metadata_holds_any_text(captions: list[str], escaped: bool) -> None:
    if not escaped:
        captions = [c.encode("utf-8", "replace").decode() for c in captions]  # UTF-8 has no lone surrogates
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = []
        for i, caption in enumerate(captions):
            (folder / f"{i}.png").touch()
            lines.append(json.dumps({"file_name": f"./{i}.png", "text": caption}, ensure_ascii=escaped))
        (folder / "metadata.jsonl").write_bytes("\n".join(lines).encode())
        assert [s.captions for s in samples_of(folder)] == [(c.strip(),) for c in captions]


def test_several_captions(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": ["one ", "two"]}\n{"file_name": "b.png", "text": "three"}')
    assert [sample.captions for sample in samples_of(tmp_path)] == [("one", "two"), ("three",)]
    metadata.unlink()
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "b.caption").write_text("four")
    assert [sample.captions for sample in samples_of(tmp_path)] == [("one\n\n two",), ("three", "four")]
    lines = [sample.captions for sample in samples_of(tmp_path, caption_lines=True)]
    assert lines == [("one", "two"), ("three", "four")]


def test_a_caption_for_those_that_have_none(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    (tmp_path / "a.txt").write_text("own")
    source = Source(str(tmp_path), caption=" sks dog ")
    samples, _ = read_samples(Data(sources=[source]))
    assert [sample.captions for sample in samples] == [("own",), ("sks dog",)]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "listed"}')
    (tmp_path / "a.txt").unlink()
    samples, _ = read_samples(Data(sources=[source]))
    assert [sample.captions for sample in samples] == [("listed",), ("sks dog",)]


LINES = ['{"file_name": "a.png", "text": "x"}', '{"file_name": "b.png", "text": "y"}']
WRONG = [
    ([LINES[0], "{broken"], r"metadata.jsonl line 2 is not an object.*JSONDecodeError.*write \{"),
    ([LINES[0], '["b.png", "y"]'], r"line 2 is not an object.*write \{"),
    ([LINES[0], "[" * 100_000], r"line 2 is not an object.*RecursionError.*write \{"),
    ([LINES[0], '{"file_name": "b.png"}'], r"line 2 is not an object.*set data.caption_column"),
    ([LINES[0], '{"text": "y"}'], r"line 2 is not an object with file_name and text.*write \{"),
    ([LINES[0], '{"file_name": "b.png", "caption": "y"}'], r"line 2 .*set data.caption_column"),
    ([LINES[0], '{"file_name": "b.png", "text": null}'], r"line 2 is not right: file_name and text must be text"),
    ([LINES[0], '{"file_name": "b.png", "text": []}'], r"line 2 is not right: file_name and text must be text"),
    ([LINES[0], '{"file_name": "b.png", "text": ["y", 2]}'], r"line 2 is not right: file_name and text must be text"),
    ([LINES[0], '{"file_name": 3, "text": "y"}'], r"line 2 is not right: file_name and text must be text"),
    ([*LINES, "", LINES[0]], r"line 4 names 'a.png' a second time; keep one line"),
    ([*LINES, LINES[0].replace("a.png", "./a.png")], r"line 3 names 'a.png' a second time"),
    ([*LINES, '{"file_name": "c.png", "text": "z"}'], r"metadata.jsonl names 'c.png', which is not in .*take the"),
    ([*LINES, '{"file_name": "../c.png", "text": "z"}'], r"line 3 names '../c.png', outside.*within"),
    ([*LINES, '{"file_name": "/etc/c.png", "text": "z"}'], r"line 3 names '/etc/c.png', outside.*within"),
    (LINES[:1], r'b.png has no line in .*metadata.jsonl; add one with "file_name": "b.png"'),
    ([LINES[0], '{"file_name": "b.png", "text": " "}'], r"b.png has an empty caption; write one"),
    ([LINES[0], '{"file_name": "b.png", "text": ["y", ""]}'], r"b.png has an empty caption; write one"),
]


@pytest.mark.parametrize("lines, message", WRONG, ids=range(len(WRONG)))
def test_metadata_is_refused_or_skipped_by_name(tmp_path: Path, lines: list[str], message: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as caught:
        read_samples(Data(str(tmp_path)))
    samples, skipped = read_samples(Data(str(tmp_path), on_error="skip"))
    assert str(caught.value) == f"{skipped[0].name} {skipped[0].reason}"
    left = {Path(sample.name).name: sample.captions for sample in samples}
    assert left == {"a.png": ("x",), "b.png": ("y",)} if len(lines) > 2 else left == {"a.png": ("x",)}
    assert len(skipped) == 1 or {Path(one.name.split()[0]).name for one in skipped} == {"metadata.jsonl", "b.png"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("file_name,text\na.png,x\nb.png,a red, large star\n", "line 3 has more cells.*in quotes"),
        ("file_name,text\na.png,x\nb.png\n", "line 3 is not an object with file_name and text"),
        ("file,text\na.png,x\nb.png,y\n", "line 2 is not an object with file_name and text.*data.caption_column"),
        ('file_name,text\na.png,x\nb.png,"y" z\n', "line 3 is no CSV .*mend it"),
        ('file_name,text\na.png,x\nb.png,"y\n', "line . is no CSV .*mend it"),
    ],
)
def test_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=f"metadata.csv {message}"):
        read_samples(Data(str(tmp_path)))


def test_folders_are_refused(tmp_path: Path) -> None:
    def refused(message: str, path: str = str(tmp_path), **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            read_samples(Data(path, **options))

    refused(r"data.path is empty; set it to a folder", "")
    refused(r"data.path '/gone/away' does not exist; set it to a folder", "/gone/away")
    refused(r"a source's path '/gone/away' does not exist", "", sources=[Source("/gone/away")])
    for option in ({"subset": "x"}, {"split": "test"}, {"image_column": "x"}):
        refused(f"{next(iter(option))} of .* that is a folder", "", sources=[Source(str(tmp_path), **option)])  # type: ignore[arg-type]
    refused(r"holds no pictures \(.png.*set its path")
    put(tmp_path / "a.png")
    refused(r"a.png has no caption: write a.txt beside it, .*train/write_captions.py writes them")
    picture = put(tmp_path / "kohya" / "10_sks dog" / "a.png")
    said = r"has no caption: write a.txt .*\[{path:.*/kohya/10_sks dog,repeats:10,caption:sks dog}\]"
    refused(said, str(tmp_path / "kohya"))
    picture.unlink()
    caption = tmp_path / "a.txt"
    caption.write_text(" \n")
    refused(r"a.png has an empty caption; write one")
    caption.write_text("ein Löwe", encoding="latin-1")
    refused(r"a.png has a broken caption: .*a.txt is not UTF-8 text.*save it as UTF-8")
    (tmp_path / "metadata.jsonl").write_text("ein Löwe", encoding="latin-1")
    refused(r"metadata.jsonl is not UTF-8 text.*save it as UTF-8")
    (tmp_path / "metadata.csv").write_text("x")
    refused(r"holds both metadata.jsonl and metadata.csv; keep one")
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).unlink()
    caption.write_text("a lion")
    assert len(samples_of(tmp_path)) == 1
    caption.chmod(0)
    if not os.access(caption, os.R_OK):  # root may read all
        refused("a.txt cannot be read")


def faults(folder: Path, **options: Any) -> dict[str, str]:
    """What is skipped: the reason by the name in the folder; under raise the first of them is what is said."""
    _, skipped = read_samples(Data(str(folder), on_error="skip", **options))
    if skipped:
        with pytest.raises(ValueError) as caught:
            read_samples(Data(str(folder), **options))
        assert str(caught.value) in [f"{one.name} {one.reason}" for one in skipped]
    assert all(isinstance(one, Skipped) and one.reason for one in skipped)
    return {os.path.relpath(one.name, folder): one.reason for one in skipped}


def test_nothing_outside_is_read_and_nothing_is_left_out_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "in", tmp_path / "in-not"  # whose name begins alike
    put(outside / "secret.png").with_suffix(".txt").write_text("secret")
    for name in ("a.png", "sub/b.png", "c.png", "d.png", "e.png"):
        put(folder / name).with_suffix(".txt").write_text(name)
    assert faults(folder) == {}
    (folder / "link.png").symlink_to("../in-not/secret.png")
    (folder / "absolute.png").symlink_to(outside / "secret.png")
    (folder / "more").symlink_to(outside)
    (folder / "c.txt").unlink()
    (folder / "c.txt").symlink_to("../in-not/secret.txt")
    (folder / "gone.png").symlink_to("nothing.png")
    (folder / "same.png").symlink_to("a.png")
    (folder / "same.txt").symlink_to("a.txt")
    (folder / "sub" / "up.png").symlink_to("../d.png")
    (folder / "sub" / "up.txt").symlink_to("../d.txt")
    (folder / "folder.png").mkdir()
    put(folder / "folder.png" / "f.png").with_suffix(".txt").write_text("f")
    os.mkfifo(folder / "pipe.png")
    (folder / "photo.heic").write_bytes(b"")
    monkeypatch.setattr(image_folder, "reads_heic", lambda: False)
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / ".hidden.png").write_bytes(b"")
    put(folder / ".thumbnails" / "a.png")
    (folder / "notes.md").write_text("read me")
    found = faults(folder)
    out = {"link.png", "absolute.png", "c.txt"}
    assert {name for name, reason in found.items() if reason.startswith("is a link out of")} == out | {"more"}
    assert found.pop("c.png").startswith("has no caption")
    assert found.pop("gone.png").startswith("is no file") and found.pop("pipe.png").startswith("is no file")
    assert found.pop("photo.heic") == "is HEIC, which needs a package: pip install -e '.[heic]'; or save it as JPEG"
    assert found.pop("drawing.svg").startswith("is of a format that is not read")
    assert found.keys() == out | {"more"}
    samples, _ = read_samples(Data(str(folder), on_error="skip"))
    there = {os.path.relpath(sample.name, folder): sample.captions[0] for sample in samples}
    own = {name: name for name in ("a.png", "sub/b.png", "d.png", "e.png")}
    assert there == own | {"same.png": "a.png", "sub/up.png": "d.png", "folder.png/f.png": "f"}
    # the folder itself may be a link
    (tmp_path / "alias").symlink_to(folder)
    samples, _ = read_samples(Data(str(tmp_path / "alias"), on_error="skip"))
    assert len(samples) == len(there)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    (sample,) = samples_of(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a.png cannot be read \(No such file.*take it out"):
        sample.read()


def test_masks_go_with_their_pictures(tmp_path: Path) -> None:
    """Each mask's grey is what its name says; a.png beside a.jpg takes its own."""
    folder = tmp_path / "pictures"
    masks = folder / "masks"  # within: its files are no pictures
    grey = {"a.png": 10, "a.jpg": 20, "b.jpg": 30, "sub/b.png": 40, "sub/c d.webp": 50}
    for name in grey:
        put(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    for name, mask in (("b.jpg", "b.png"), ("sub/c d.webp", "sub/c d.bmp"), *[(n, n) for n in ("a.png", "sub/b.png")]):
        put(masks / mask, Image.new("L", (20, 16), grey[name]))
    put(masks / "a.jpg", Image.new("L", (20, 16), grey["a.jpg"]))
    samples = samples_of(folder, masks=str(masks))
    assert {os.path.relpath(sample.name, folder) for sample in samples} == grey.keys()
    for sample in samples:
        assert sample.read_mask is not None
        shade = np.asarray(Image.open(io.BytesIO(sample.read_mask())).convert("L")).mean()
        assert abs(shade - grey[os.path.relpath(sample.name, folder)]) <= 1

    (masks / "a.jpg").unlink()  # a.png's mask is not taken for it
    found = faults(folder, masks=str(masks))
    assert list(found) == ["a.jpg"] and found["a.jpg"].startswith("has no mask in")
    put(masks / "a.bmp", Image.new("L", (20, 16)))  # of a.png or of a.jpg? of a.jpg it must be, but nothing says so
    found = faults(folder, masks=str(masks))
    assert found.keys() == {"a.jpg", "masks/a.bmp"} and "is the mask of no picture" in found["masks/a.bmp"]
    (masks / "a.bmp").unlink()
    (folder / "a.jpg").unlink()
    put(masks / "z.png")
    assert list(faults(folder, masks=str(masks))) == ["masks/z.png"]
    (masks / "z.png").unlink()
    (masks / "b.png").unlink()
    (masks / "b.png").symlink_to(folder / "a.png")
    assert faults(folder, masks=str(masks)).keys() == {"masks/b.png", "b.jpg"}
    with pytest.raises(ValueError, match=r"masks '.*nowhere' of .*pictures is no folder; set it to"):
        read_samples(Data(str(folder), masks=str(tmp_path / "nowhere")))
