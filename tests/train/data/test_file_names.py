"""Names of pictures, captions and masks that mean the same file, and captions that contradict each other."""

import hashlib
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.train.data.test_folder import colour, faults, put, samples_of
from train.data.dataset import Data
from train.data.names import key_of, stem_of
from train.data.samples import read_samples

NFC, NFD = (unicodedata.normalize(form, "ñandú é Å 한국 ガ") for form in ("NFC", "NFD"))


def captions(folder: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {str(Path(s.name).relative_to(folder)): s.captions for s in samples_of(folder, **options)}


@pytest.mark.parametrize(("stored", "said"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "Metadata.JSONL", ".txt", ".TXT", ".Caption"])
@pytest.mark.parametrize(
    ("ending", "listed"), [(".png", ".png"), (".PNG", ".png"), (".jpg", ".JPG"), (".JpEg", ".jpeg")]
)
def test_a_name_in_another_spelling(
    stored: str, said: str, kind: str, ending: str, listed: str, tmp_path: Path
) -> None:
    assert NFC != NFD
    for i in range(2):
        put(tmp_path / stored / f"{stored} {i}{ending}", Image.new("RGB", (20, 16), colour(i)))
        name = f"{said}/{said} {i}{listed}"
        if kind.startswith("."):
            text = tmp_path / stored / f"{said} {i}{kind}"
            text.write_text(f"picture {i}")
            continue
        with (tmp_path / kind).open("a", encoding="utf-8") as stream:
            if kind.lower().endswith("csv"):
                stream.write(("file_name,text\n" if i == 0 else "") + f"{name},picture {i}\n")
            else:
                stream.write(json.dumps({"file_name": name, "text": f"picture {i}"}, ensure_ascii=i == 0) + "\n")
    found = samples_of(tmp_path)
    assert [sample.captions for sample in found] == [("picture 0",), ("picture 1",)]
    for i, sample in enumerate(found):
        assert sample.name == str(tmp_path / stored / f"{stored} {i}{ending}")  # the file's own name
        with Image.open(io.BytesIO(sample.read())) as picture:
            assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - colour(i)).max() < 6


def test_the_very_name_goes_before_another_spelling(tmp_path: Path) -> None:
    for i, name in enumerate((f"{NFC}.png", f"{NFD}.png", f"{NFC}.PNG")):
        put(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
        if i == 2:
            (tmp_path / name).with_suffix(".txt").write_text(f"{NFC}.png")
    assert captions(tmp_path) == {
        f"{NFC}.PNG": (f"{NFC}.png",),
        f"{NFC}.png": (f"{NFC}.png",),
        f"{NFD}.png": (f"{NFD}.png",),
    }
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    lines = [{"file_name": name, "text": name} for name in (f"{NFC}.png", f"{NFD}.png", f"{NFC}.PNG")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert captions(tmp_path) == {line["file_name"]: (line["text"],) for line in lines}
    lines[2]["file_name"] = f"{NFD}.Png"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = faults(tmp_path)
    assert "which could be any of" in found["metadata.jsonl line 3"] and found[f"{NFC}.PNG"].startswith(
        "has no line in"
    )


def test_a_name_that_is_another_one(tmp_path: Path) -> None:
    put(tmp_path / "Dog.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "dog.PNG", "text": "a"}')
    assert "names 'dog.PNG', which is not in" in (found := faults(tmp_path))["metadata.jsonl"]
    assert found["metadata.jsonl"].endswith("did you mean 'Dog.png'?")
    assert key_of("a/b.PNG") == "a/b.png" != key_of("a/B.PNG") and stem_of("a.b.C") == "a.b"
    (tmp_path / "metadata.jsonl").unlink()
    for name in ("Dog.txt", "Dog.TXT"):
        (tmp_path / name).write_text(name)
    assert "could have its caption from any of 'Dog.TXT', 'Dog.txt'" in faults(tmp_path)["Dog.png"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_in_subfolders_is_what_datasets_reads(kind: str, tmp_path: Path) -> None:
    named = {"": ["a.png", "deep/x/b.png"], "one": ["a.png", "more/c.png"], "two/in": ["a.png"], "two": ["d.png"]}
    for folder, names in named.items():
        rows = [{"file_name": name, "text": f"{name} of {folder or 'all'}"} for name in names]
        for name in names:
            put(tmp_path / folder / name)
        if kind == "jsonl":
            text = "\n".join(map(json.dumps, rows))
        else:
            text = "file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows)
        (tmp_path / folder / f"metadata.{kind}").write_text(text)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / ".cache")
    )
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    wanted = {str(Path(row["image"]["path"]).relative_to(tmp_path)): (row["text"],) for row in theirs}
    assert len(wanted) == 6 and captions(tmp_path) == wanted
    put(tmp_path / "two" / "e.png")
    assert f"has no line in {tmp_path}/two/metadata.{kind}" in faults(tmp_path)["two/e.png"]
    (tmp_path / "two" / "e.txt").write_text("a caption")
    assert "but a caption in" in faults(tmp_path)["two/e.png"]
    (tmp_path / "two" / "e.png").unlink()
    other = "csv" if kind == "jsonl" else "jsonl"
    (tmp_path / "two" / f"metadata.{other}").write_text("")
    with pytest.raises(ValueError, match=r"two holds both metadata\.jsonl and metadata\.csv; keep one"):
        read_samples(Data(str(tmp_path)))


def test_subfolders_with_metadata_beside_ones_with_texts(tmp_path: Path) -> None:
    put(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "listed"}')
    put(tmp_path / "two" / "a.png").with_suffix(".txt").write_text("beside")
    assert captions(tmp_path) == {"one/a.png": ("listed",), "two/a.png": ("beside",)}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "one/a.png", "text": "from above"}')
    found = faults(tmp_path)
    assert "names 'a.png' a second time, after" in found["one/metadata.jsonl line 1"]
    assert "but a caption in" in found["two/a.png"]


def test_captions_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    for name in "abcde":
        put(tmp_path / f"{name}.png")
    lines = [{"file_name": f"{name}.png", "text": ["one", " two "] if name == "b" else name} for name in "abcde"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, text in (("a.txt", " a\n"), ("b.caption", "two"), ("c.txt", " \n"), ("d.TXT", "another")):
        (tmp_path / name).write_text(text)
    found = faults(tmp_path)
    assert list(found) == ["d.png"]
    assert f"has one caption in {tmp_path}/metadata.jsonl and another in {tmp_path}/d.TXT; keep one" in found["d.png"]
    (tmp_path / "d.TXT").unlink()
    (tmp_path / "b.caption").write_text("two\none")
    assert list(faults(tmp_path)) == ["b.png"] and faults(tmp_path, caption_lines=True) == {}


def test_masks_in_another_spelling(tmp_path: Path) -> None:
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    names = {f"{NFC}.JPG": f"{NFD}.jpg", "b.png": "b.PNG", f"{NFD}/c.webp": f"{NFC}/c.png", "d.png": "d.png"}
    for i, (name, mask) in enumerate(names.items()):
        put(folder / name)
        (folder / name).with_suffix(".txt").write_text("a")
        put(masks / mask, Image.new("L", (20, 16), 30 * i + 20))
    put(masks / "d.PNG")
    found = faults(folder, masks=str(masks))
    assert list(found) == ["../masks/d.PNG"]
    (masks / "d.PNG").unlink()
    shades = {}
    for sample in samples_of(folder, masks=str(masks)):
        assert sample.read_mask is not None
        with Image.open(io.BytesIO(sample.read_mask())) as mask_picture:
            shades[str(Path(sample.name).relative_to(folder))] = int(np.asarray(mask_picture).mean().round())
    assert shades == {name: 30 * i + 20 for i, name in enumerate(names)}


def snapshot(root: Path, files: dict[str, bytes]) -> Path:
    """A data set in the Hub's cache: every file is a link to its content."""
    repository = root / "datasets--me--dogs"
    folder = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        depth = len(Path(name).parts) + 1
        (folder / name).symlink_to(f"{'../' * depth}blobs/{blob.name}")
    return folder


def test_a_data_set_in_the_hubs_cache(tmp_path: Path) -> None:
    picture = put(tmp_path / "a.png").read_bytes()
    folder = snapshot(tmp_path / "hub", {
        "train/a.png": picture, "train/metadata.jsonl": b'{"file_name": "a.png", "text": "listed"}',
        "more/b.PNG": picture, "more/b.txt": b"beside"})  # fmt: skip
    assert captions(folder) == {"train/a.png": ("listed",), "more/b.PNG": ("beside",)}
    assert captions(folder / "train") == {"a.png": ("listed",)}  # a subfolder of it
    assert samples_of(folder)[0].read() == picture
    # a link beside them that leads elsewhere is still refused, and so are such links in a folder that is no snapshot
    (folder / "more" / "c.png").symlink_to(tmp_path / "a.png")
    assert faults(folder)["more/c.png"].startswith("is a link out of")
    own = tmp_path / "own"
    own.mkdir()
    (own / "d.png").symlink_to(folder / "train" / "a.png")
    assert faults_of_links(own) == ["d.png"]


def faults_of_links(folder: Path) -> list[str]:
    with pytest.raises(ValueError, match=r"d\.png is a link out of"):
        read_samples(Data(str(folder)))
    put(folder / "good.png").with_suffix(".txt").write_text("a")
    return list(faults(folder))


def test_a_table_of_paths_in_the_hubs_cache(tmp_path: Path) -> None:
    picture = put(tmp_path / "a.png").read_bytes()
    table = datasets.Dataset.from_dict({"image": [{"path": "images/a.png", "bytes": None}], "text": ["a dog"]})
    table.to_parquet(str(tmp_path / "t.parquet"))
    folder = snapshot(
        tmp_path / "hub", {"dogs.parquet": (tmp_path / "t.parquet").read_bytes(), "images/a.png": picture}
    )
    (sample,) = samples_of(folder / "dogs.parquet", cache=str(tmp_path / "cache"))
    assert sample.read() == picture and sample.captions == ("a dog",)
