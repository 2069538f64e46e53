"""Captions against the pictures they were written for, and pixels against NumPy or what was drawn."""

import io
import json
import random
import struct
import tempfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data import Data, Sample, pixel_hash, read_picture, read_samples, split, to_square

NAMES = ("a.png", "with space/b c.PNG", "deep/er/a.jpg", "日本/ñandú 🦩.webp", "x.y.z.bmp", "a.tiff")


def colour(i: int) -> tuple[int, int, int]:
    return (20 + 40 * i, 250 - 30 * i, 90)


def put(file: Path, picture: Image.Image | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("RGB", (20, 16), colour(0))).save(file)
    return file


def caption_of(i: int) -> str:
    return f'picture {i}: "gläss"\u2028and\tτίλντα, [{i}]'


def check(samples: list[Sample], names: tuple[str, ...] = NAMES) -> None:
    """Each sample's caption says the number whose colour its picture has."""
    assert len(samples) == len(names)
    for sample in samples:
        i = next(i for i, name in enumerate(names) if sample.name.endswith(f"/{name}"))
        assert sample.caption == caption_of(i)
        assert np.abs(np.asarray(sample.load()).astype(int) - colour(i)).max() < 6  # JPEG and WebP round


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("kind", ["metadata", "sidecars"])
def test_captions_stay_with_their_pictures(tmp_path: Path, kind: str, mark: str) -> None:
    for i, name in enumerate(NAMES):
        put(tmp_path / name, Image.new("RGB", (20, 16), colour(i)))
        if kind == "sidecars" and name != "a.tiff":
            (tmp_path / name).with_suffix(".txt").write_text(f"{mark} {caption_of(i)}\n", encoding="utf-8")
    if kind == "sidecars":
        (tmp_path / "a.tiff").unlink()  # a.png has a.txt already
        check(read_samples(Data(str(tmp_path))), NAMES[:-1])
        return
    lines = [
        json.dumps({"other": 1, "words": f" {caption_of(i)}", "file_name": name}, ensure_ascii=i % 2 == 0)
        for i, name in enumerate(NAMES)
    ]
    seen = []
    for seed in range(3):
        random.Random(seed).shuffle(lines)
        (tmp_path / "metadata.jsonl").write_text(mark + "\r\n\n".join(lines), encoding="utf-8", newline="")
        samples = read_samples(Data(str(tmp_path), caption_column="words"))
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
        assert [s.caption for s in read_samples(Data(name))] == [c.strip() for c in captions]


def test_trigger_is_put_once(tmp_path: Path) -> None:
    for i, caption in enumerate(("a fox", "a fox, zelk style", "zelk style, a fox")):
        put(tmp_path / f"{i}.png").with_suffix(".txt").write_text(caption)
    captions = [sample.caption for sample in read_samples(Data(str(tmp_path), trigger="zelk style"))]
    assert captions == ["zelk style, a fox", "a fox, zelk style", "zelk style, a fox"]


LINES = ['{"file_name": "a.png", "text": "x"}', '{"file_name": "b.png", "text": "y"}']


@pytest.mark.parametrize(
    "lines, message",
    [
        ([LINES[0], "{broken"], r"metadata.jsonl line 2 is not an object.*JSONDecodeError.*write \{"),
        ([LINES[0], '["b.png", "y"]'], r"line 2 is not an object.*write \{"),
        ([LINES[0], '{"file_name": "b.png"}'], r"line 2 .*KeyError\('text'\).*set data.caption_column"),
        ([LINES[0], '{"text": "y"}'], r"line 2 .*KeyError\('file_name'\).*write \{"),
        ([LINES[0], '{"file_name": "b.png", "caption": "y"}'], r"line 2 .*set data.caption_column"),
        ([LINES[0], '{"file_name": "b.png", "text": null}'], r"line 2: file_name and text must be text"),
        ([LINES[0], '{"file_name": 3, "text": "y"}'], r"line 2: file_name and text must be text"),
        ([*LINES, "", LINES[0]], r"line 4 names 'a.png' a second time; keep one line"),
        ([*LINES, LINES[0].replace("a.png", "./a.png")], r"line 3 names './a.png' a second time"),
        ([*LINES, '{"file_name": "c.png", "text": "z"}'], r"metadata.jsonl names 'c.png', which is not in .*take the"),
        ([*LINES, '{"file_name": "../c.png", "text": "z"}'], r"line 3 names '../c.png', outside.*within"),
        ([*LINES, '{"file_name": "/etc/c.png", "text": "z"}'], r"line 3 names '/etc/c.png', outside.*within"),
        (LINES[:1], r'b.png has no line in .*metadata.jsonl; add one with "file_name": "b.png"'),
        ([LINES[0], '{"file_name": "b.png", "text": " "}'], r"b.png has an empty caption; write one"),
    ],
)
def test_metadata_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_samples(Data(str(tmp_path)))


def test_folders_are_refused(tmp_path: Path) -> None:
    def refused(message: str, path: str = str(tmp_path), **options: float) -> None:
        with pytest.raises(ValueError, match=message):
            read_samples(Data(path, **options))  # type: ignore[arg-type]

    refused(r"data.path is empty; set it to a folder", "")
    refused(r"/gone/away' does not exist; set it to a folder", "/gone/away")
    refused(r"holds no pictures \(.png.*set data.path")
    put(tmp_path / "a.png")
    refused(r"a.png has no caption: write a.txt beside it")
    caption = tmp_path / "a.txt"
    caption.write_text(" \n")
    refused(r"a.png has an empty caption; write one")
    caption.write_text("ein Löwe", encoding="latin-1")
    refused(r"a.txt is not UTF-8 text.*save it as UTF-8")
    (tmp_path / "metadata.jsonl").write_text("ein Löwe", encoding="latin-1")
    refused(r"metadata.jsonl is not UTF-8 text.*save it as UTF-8")
    (tmp_path / "metadata.jsonl").unlink()
    caption.write_text("a lion")
    refused(r"holds 1 pictures, too few to hold one out; set data.validation=0")
    assert len(read_samples(Data(str(tmp_path), validation=0))) == 1


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, form: int, rows: bytes) -> bytes:
    """A PNG written by hand. form: 0 grey, 2 RGB."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, form, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(form: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.png", encoded("PNG")[:2000], "cannot be read as a picture.*save it again or take it out"),
        ("cut.jpg", encoded("JPEG")[:700], "cannot be read as a picture.*save it again or take it out"),
        ("text.png", b"I am text", "cannot be read as a picture.*save it again or take it out"),
        ("none.png", b"", "cannot be read as a picture.*save it again or take it out"),
        # Pillow raises a bare ValueError for these two
        ("palette.bmp", encoded("BMP", "P")[:47] + b"\1" + encoded("BMP", "P")[48:], "cannot be read"),
        ("head.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0"), "cannot be read"),
        ("bomb.png", png(40_000, 40_000, 8, 0, b""), r"is too large \(.*1600000000 pixels.*scale it down"),
    ],
    ids=lambda value: value if str(value)[-4:-3] == "." else "",
)
def test_broken_pictures_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (sample,) = read_samples(Data(str(tmp_path), validation=0))
    with pytest.raises(ValueError, match=f"/{name} {message}"):
        sample.load()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_without_a_known_white_are_refused(tmp_path: Path, mode: str) -> None:
    file = put(tmp_path / "a.tif", Image.new(mode, (4, 4), 1))
    with pytest.raises(ValueError, match=f"a.tif cannot be read.*its mode is {mode}.*save it again"):
        read_picture(file)


@pytest.mark.filterwarnings("error")
def test_large_pictures_are_read_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # refuses above twice that
    assert read_picture(put(tmp_path / "a.png", Image.new("RGB", (20, 30)))).size == (20, 30)
    with pytest.raises(ValueError, match="scale it down"):
        read_picture(put(tmp_path / "a.png", Image.new("RGB", (20, 31))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    stored = {  # the EXIF standard: where the stored row 0 and column 0 belong
        1: drawn,
        2: drawn[:, ::-1],
        3: drawn[::-1, ::-1],
        4: drawn[::-1],
        5: drawn.transpose(1, 0, 2),
        6: drawn.transpose(1, 0, 2)[::-1],
        7: drawn.transpose(1, 0, 2)[::-1, ::-1],
        8: drawn.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png")), drawn)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    rgba[0, 0], rgba[0, 1] = (10, 20, 30, 0), (10, 20, 30, 255)
    alpha = rgba[..., 3:].astype(float) / 255
    read = np.asarray(read_picture(put(tmp_path / "rgba.png", Image.fromarray(rgba)))).astype(float)
    assert np.abs(read - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    read = np.asarray(read_picture(put(tmp_path / "la.png", Image.fromarray(rgba[..., 2:])))).astype(float)
    assert np.abs(read - (rgba[..., 2:3] * alpha + 255 * (1 - alpha))).max() <= 1

    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(read_picture(tmp_path / "p.png")).tolist() == [
        [[10, 20, 30], [255, 255, 255]],
        [[70, 80, 90], [255, 255, 255]],
    ]


def test_grey_and_cmyk(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = np.asarray(read_picture(put(tmp_path / "l.png", Image.fromarray(grey))))
    assert np.array_equal(read, np.stack([grey] * 3, -1))
    black = np.asarray(read_picture(put(tmp_path / "1.png", Image.fromarray(grey > 99))))
    assert np.array_equal(black, np.stack([(grey > 99) * 255] * 3, -1))
    ink = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    read = np.asarray(read_picture(put(tmp_path / "c.tif", Image.fromarray(ink, mode="CMYK"))))
    paper = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    assert np.abs(read - paper).max() <= 1


@pytest.mark.parametrize("form", ["png", "tif"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, form: str) -> None:
    deep = (np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)
    file = put(tmp_path / f"a.{form}", Image.fromarray(deep))
    assert Image.open(file).mode == "I;16"
    read = np.asarray(read_picture(file)).astype(float)
    assert np.abs(read - deep[..., None] / 257).max() <= 1
    rows = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in deep)
    (tmp_path / "rgb.png").write_bytes(png(64, 64, 16, 2, rows))  # which Pillow reduces to 8 bits by itself
    assert np.array_equal(np.asarray(read_picture(tmp_path / "rgb.png")), read)


def test_square_is_the_middle() -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 300, 3), np.uint8))
    pixels = to_square(wide, 48)
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.float32
    by_hand = wide.resize((150, 48), Image.Resampling.LANCZOS).crop((51, 0, 99, 48))
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(by_hand))
    assert torch.equal(to_square(wide.transpose(Image.Transpose.TRANSPOSE), 48), pixels.transpose(1, 2))
    ends = np.zeros((16, 16, 3), np.uint8)
    ends[3, 5] = 0, 255, 51
    same = to_square(Image.fromarray(ends), 16)
    torch.testing.assert_close(same[:, 3, 5], torch.tensor([-1.0, 1.0, -0.6]))
    assert float(same.sum()) == pytest.approx(-3 * 256 + 2.4, abs=1e-3)


def test_pixel_hash_is_of_pixels() -> None:
    picture = Image.new("RGB", (4, 6))
    assert pixel_hash(picture) == pixel_hash(picture.copy()) != pixel_hash(picture.resize((6, 4)))  # the same bytes
    edited = picture.copy()
    edited.putpixel((3, 5), (0, 0, 1))
    assert pixel_hash(edited) != pixel_hash(picture)


@given(st.sets(st.text(), min_size=2, max_size=40), st.floats(0.001, 0.999), st.integers(0, 9), st.randoms())
def test_split(keys: set[str], share: float, seed: int, shuffler: random.Random) -> None:
    there = sorted(keys)
    train, held = split(there, share, seed)
    assert sorted(train + held) == list(range(len(keys)))  # disjoint, and all
    assert train and held and abs(len(held) - share * len(keys)) <= 1
    moved = there.copy()
    shuffler.shuffle(moved)
    assert {moved[i] for i in split(moved, share, seed)[1]} == {there[i] for i in held}
    assert split(there, 0, seed) == (list(range(len(keys))), [])


def test_split_depends_on_the_seed() -> None:
    keys = [str(i) for i in range(50)]
    assert len({tuple(split(keys, 0.1, seed)[1]) for seed in range(5)}) > 1


def parquet(file: Path, kind: str, captions: list[str | None], pictures: list[bytes]) -> None:
    if kind == "datasets":
        features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
        rows = {"photo": [{"bytes": b, "path": None} for b in pictures], "words": captions}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    elif kind == "struct":
        pq.write_table(pa.table({"photo": [{"bytes": b, "path": "x"} for b in pictures], "words": captions}), file)
    else:
        pq.write_table(pa.table({"photo": pictures, "words": captions}), file)


@pytest.mark.parametrize("kind", ["datasets", "struct", "bytes"])
def test_parquet_gives_the_folders_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures, captions = [], ["one", " two\n", "drei ß"]
    for i, caption in enumerate(captions):
        noise = np.random.default_rng(i).integers(0, 255, (10 + i, 12, 4), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        file = tmp_path / "folder" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(file, exif=exif)
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
        pictures.append(file.read_bytes())
    parquet(tmp_path / "my set.parquet", kind, [*captions], pictures)
    columns = {"image_column": "photo", "caption_column": "words"}
    read = read_samples(Data(str(tmp_path / "my set.parquet"), **columns))  # type: ignore[arg-type]
    folder = read_samples(Data(str(tmp_path / "folder")))
    assert [s.caption for s in read] == [s.caption for s in folder] == ["one", "two", "drei ß"]
    assert [pixel_hash(s.load()) for s in read] == [pixel_hash(s.load()) for s in folder]


def test_parquet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "set.parquet"

    def refused(message: str, **options: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_samples(Data(str(file), **{"image_column": "photo", "caption_column": "words"} | options))  # type: ignore[arg-type]

    refused("set.parquet.*datasets cannot load it.*check the spelling")
    good = encoded("PNG")
    parquet(file, "struct", ["a", "b"], [good, good[:2000]])
    refused("has no column 'text', only photo, words; set data.image_column", caption_column="text")
    pq.write_table(pa.table({"words": ["a", "b"], "number": [1, 2]}), file)
    refused("column 'number' of .*set.parquet holds no pictures.*set data.image_column", image_column="number")
    with pytest.raises(ValueError, match=r"set.parquet\[0\] cannot be read as a picture"):
        read_samples(Data(str(file), image_column="words", caption_column="words"))[0].load()
    parquet(file, "struct", ["a", "b"], [good, good[:2000]])
    samples = read_samples(Data(str(file), image_column="photo", caption_column="words"))
    assert samples[0].load().size == (40, 40)
    with pytest.raises(ValueError, match=r"set.parquet\[1\] cannot be read as a picture.*take it out"):
        samples[1].load()
    parquet(file, "struct", ["a", None], [good, good])
    refused(r"set.parquet\[1\] has None as words, not text.*set data.caption_column")
    file.write_bytes(b"no parquet")
    refused("set.parquet.*datasets cannot load it.*check the spelling")
