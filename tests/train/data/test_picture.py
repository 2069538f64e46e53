"""Decoded pixels against NumPy or what was drawn, and masks against their pictures."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.program.paths import ROOT
from infer.sample import picture
from infer.sample.picture import decode, pixel_hash
from train.data.mask import decode_mask


def put(file: Path, picture: Image.Image) -> Path:
    picture.save(file)
    return file


def read_picture(file: Path) -> Image.Image:
    return decode(file.read_bytes(), str(file))


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
        # what Pillow would read, or have Ghostscript run, though no file of its name should hold it
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read.*no format that is read"),
        ("icon.png", encoded("ICO"), "cannot be read.*no format that is read"),
        # Pillow raises a bare ValueError for these two
        ("palette.bmp", encoded("BMP", "P")[:47] + b"\1" + encoded("BMP", "P")[48:], "cannot be read"),
        ("head.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0"), "cannot be read"),
        ("bomb.png", png(40_000, 40_000, 8, 0, b""), r"is too large \(.*1600000000 pixels.*scale it down"),
    ],
    ids=lambda value: value if str(value)[-4:-3] == "." else "",
)
def test_broken_pictures_are_refused(name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^folder/{name} {message}"):
        decode(content, f"folder/{name}")


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


def test_pixel_hash_is_of_pixels() -> None:
    picture = Image.new("RGB", (4, 6))
    assert pixel_hash(picture) == pixel_hash(picture.copy()) != pixel_hash(picture.resize((6, 4)))  # the same bytes
    edited = picture.copy()
    edited.putpixel((3, 5), (0, 0, 1))
    assert pixel_hash(edited) != pixel_hash(picture)


def save(picture: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    "form, options, most",
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG2000", {}, 0),
        ("JPEG", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 12),
        ("WEBP", {"quality": 95}, 16),
        ("AVIF", {"quality": 95}, 16),
    ],
)
def test_formats(form: str, options: dict[str, object], most: int) -> None:
    read = decode(save(gradient(), form, **options), "a")
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read).astype(int) - np.asarray(gradient())).max() <= most


def test_a_jpeg_in_printing_inks() -> None:
    flat = Image.new("CMYK", (16, 16), (40, 120, 200, 30))
    paper = (255 - np.array([40.0, 120.0, 200.0])) * (255 - 30.0) / 255
    assert np.abs(np.asarray(decode(save(flat, "JPEG", quality=95), "a")).astype(float) - paper).max() < 8


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    content = save(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    assert decode(content, "a").getcolors() == [(200, (255, 0, 0))]


@pytest.mark.parametrize("background, colour", [("white", 255), ("black", 0), ("#808080", 128)])
def test_the_background_is_a_choice(background: str, colour: int) -> None:
    content = save(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG")
    assert decode(content, "a", background).getcolors() == [(16, (colour,) * 3)]


def test_a_bound_on_pixels() -> None:
    content = save(gradient(), "PNG")
    assert decode(content, "a", most_pixels=2400).size == (60, 40)
    with pytest.raises(ValueError, match=r"^a is too large \(2400 pixels, more than data.most_pixels=2399\); scale it"):
        decode(content, "a", most_pixels=2399)
    # the header says it: what follows need not even be there
    with pytest.raises(ValueError, match="too large"):
        decode(png(60, 40, 8, 0, b""), "a", most_pixels=2399)


def tiff16(rows: np.ndarray, photometric: int) -> bytes:
    """A TIFF of 16 bits by hand. photometric: 0 white is zero, 1 black is zero."""
    body = rows.astype("<u2").tobytes()
    entries = [(256, rows.shape[1]), (257, rows.shape[0]), (258, 16), (259, 1), (262, photometric), (273, 134)]
    entries += [(277, 1), (278, rows.shape[0]), (279, len(body)), (284, 1)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + body


def test_sixteen_bits_where_white_is_zero_or_one_grey_is_clear() -> None:
    rows = np.array([[0, 0x1234, 0x8000, 0xFFFF]])
    for photometric, expected in ((1, rows >> 8), (0, 255 - (rows >> 8))):
        assert np.array_equal(np.asarray(decode(tiff16(rows, photometric), "a"))[..., 1], expected)
    content = png(4, 1, 16, 0, b"\0" + rows.astype(">u2").tobytes())
    clear = content.replace(chunk(b"IEND", b""), b"")
    at = clear.index(b"IDAT") - 4
    clear = clear[:at] + chunk(b"tRNS", b"\x12\x34") + clear[at:] + chunk(b"IEND", b"")
    assert np.asarray(decode(clear, "a", "#00ff00")).tolist() == [[[0] * 3, [0, 255, 0], [128] * 3, [255] * 3]]


PRIMARIES = np.array([[0.515, 0.292, 0.157], [0.241, 0.692, 0.067], [-0.001, 0.042, 0.784]])  # Display P3, XYZ at D50
SRGB_PRIMARIES = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def profile(gamma: float, primaries: np.ndarray | None, name: bytes = b"wide") -> bytes:
    """An ICC profile by hand: of a matrix and a gamma, or of greys."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def colour(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + number(x) + number(y) + number(z)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(80)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": colour(0.9642, 1.0, 0.8249)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {key: colour(*primaries[:, i]) for i, key in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", place + len(body), len(value))
        body += value
    space = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"", 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + number(0.9642) + number(1.0) + number(0.8249)
    return head + bytes(128 - len(head)) + table + body


def in_srgb(values: np.ndarray, gamma: float, primaries: np.ndarray) -> np.ndarray:
    """What a profile's colours are in sRGB, by its definition."""
    linear = np.linalg.solve(SRGB_PRIMARIES, primaries @ ((values.reshape(-1, 3) / 255) ** gamma).T).T.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    shaped: np.ndarray = (curved * 255).reshape(values.shape)
    return shaped


def test_colours_by_their_profile() -> None:
    soft = (np.asarray(gradient()).astype(int) // 2 + 64).astype(np.uint8)  # within what sRGB has
    plain, wide = Image.fromarray(soft), profile(1.8, PRIMARIES)
    expected = in_srgb(soft, 1.8, PRIMARIES)
    read = np.asarray(decode(save(plain, "PNG", icc_profile=wide), "a")).astype(float)
    assert np.abs(read - expected).max() <= 2 < 10 < np.abs(expected - soft).max()
    half = plain.copy()
    half.putalpha(Image.linear_gradient("L").resize(plain.size))
    over = np.asarray(decode(save(half, "PNG", icc_profile=wide), "a", "#004080")).astype(float)
    alpha = np.asarray(half.getchannel("A")).astype(float)[..., None] / 255
    assert np.abs(over - (alpha * expected + (1 - alpha) * np.array([0, 64, 128]))).max() <= 3  # the ground is sRGB
    palette = plain.quantize(16)
    expected = in_srgb(np.asarray(palette.convert("RGB")), 1.8, PRIMARIES)
    read = np.asarray(decode(save(palette, "PNG", icc_profile=wide), "a")).astype(float)
    assert np.abs(read - expected).max() <= 2
    greys = plain.convert("L")
    expected = in_srgb(np.repeat(np.asarray(greys)[..., None], 3, -1), 1.0, SRGB_PRIMARIES)
    for form in (greys, Image.merge("LA", (greys, Image.new("L", greys.size, 255)))):
        read = np.asarray(decode(save(form, "PNG", icc_profile=profile(1.0, None)), "a")).astype(float)
        assert np.abs(read - expected).max() <= 2
    # sRGB's own name, a broken profile, and one of another kind of picture: as everybody shows them
    for other in (profile(1.8, PRIMARIES, b"sRGB built-in"), b"no profile", wide[:200], profile(1.8, None)):
        assert np.array_equal(np.asarray(decode(save(plain, "PNG", icc_profile=other), "a")), soft)


def test_a_large_picture_is_hashed_as_a_whole_and_in_little_memory() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1100, 3), np.uint8)
    expected = hashlib.sha256(b"1100x1500" + noise.tobytes()).hexdigest()
    assert pixel_hash(Image.fromarray(noise)) == expected


MEMORY = """
import sys
from infer.sample.picture import decode, pixel_hash
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
for file in sys.argv[1:]:
    content = open(file, "rb").read()
    before = peak()
    picture = decode(content, file)
    pixel_hash(picture)
    print((peak() - before) / picture.width / picture.height)
    del picture
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_decoding_holds_no_more_than_it_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6000, 4000), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (6000, 8000), "red").save(tmp_path / "clear.png", compress_level=1)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "turned.jpg"), str(tmp_path / "clear.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    turned, clear = map(float, done.stdout.split())
    assert 4 < turned < 8.7
    assert 4 < clear < 13.7 - 8 / 2 + 1  # on top of the first one's peak, which was of half as many pixels


def test_masks() -> None:
    levels = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    assert np.array_equal(np.asarray(decode_mask(save(levels, "PNG"), "m", (20, 10))), np.asarray(levels))
    assert decode_mask(save(levels, "PNG"), "m", (40, 20)).size == (40, 20)
    assert decode_mask(save(levels, "PNG"), "m", (199, 101)).size == (199, 101)  # rounded by whoever scaled it
    for size in ((10, 20), (20, 20), (40, 24)):
        with pytest.raises(ValueError, match=f"^m is 20x10, but its picture {size[0]}x{size[1]}; give both"):
            decode_mask(save(levels, "PNG"), "m", size)
    with pytest.raises(ValueError, match=r"^m is black all over.*take its picture out"):
        decode_mask(save(Image.new("L", (20, 10)), "PNG"), "m", (20, 10))
    with pytest.raises(ValueError, match=r"^m cannot be read as a picture"):
        decode_mask(b"text", "m", (20, 10))
    half = Image.new("LA", (20, 10), (255, 0))
    half.paste((255, 255), (0, 0, 10, 10))
    read = np.asarray(decode_mask(save(half, "PNG"), "m", (20, 10)))
    assert (read[:, :10] == 255).all() and (read[:, 10:] == 0).all()  # transparent is black


def with_chunks(content: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks after its header."""
    return content[:33] + b"".join(chunks) + content[33:]


LARGE = json.dumps({"nodes": ["KSampler"] * 400_000}).encode()  # 4.8 MB: a workflow of an image generator


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"tEXt", b"prompt\0" + LARGE)],
        [chunk(b"tEXt", b"workflow\0" + LARGE)] * 15,  # 72 MB, more than Pillow reads of all texts together
        [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE))],
        [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE))],
        [chunk(b"iTXt", b"parameters\0\0\0\0\0" + LARGE), chunk(b"gAMA", struct.pack(">I", 45455))],
        [chunk(b"zTXt", b"a\0\0not compressed at all"), chunk(b"tEXt", b"")],
    ],
    ids=["prompt", "many", "compressed", "international", "between others", "broken"],
)
def test_texts_in_a_png_are_not_in_the_way(chunks: list[bytes]) -> None:
    plain = encoded("PNG")
    wanted = decode(plain, "plain.png").tobytes()
    assert decode(with_chunks(plain, *chunks), "a.png").tobytes() == wanted
    end = chunk(b"IEND", b"")
    assert plain.endswith(end)
    assert decode(plain.removesuffix(end) + b"".join(chunks) + end, "behind the pixels.png").tobytes() == wanted


def test_texts_that_say_how_a_png_lies_are_read() -> None:
    plain = encoded("PNG")
    upright = decode(plain, "plain.png")
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = with_chunks(
        plain, chunk(b"tEXt", b"workflow\0" + LARGE), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    )
    assert decode(turned, "a.png").tobytes() == upright.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_a_png_that_is_cut_within_a_text_is_refused() -> None:
    whole = with_chunks(encoded("PNG"), chunk(b"tEXt", b"workflow\0" + LARGE))
    for length in (40, 45, 5_000, len(LARGE)):
        with pytest.raises(ValueError, match=r"cut.png cannot be read as a picture"):
            decode(whole[:length], "cut.png")


def box(brand: bytes) -> bytes:
    """The first bytes of a file of the ISO base media format."""
    return b"\0\0\0\x18ftyp" + brand + b"\0" * 40


def test_a_picture_whose_package_is_absent_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "reads_heic", lambda: False)
    with pytest.raises(ValueError, match=r"a\.heic is HEIC, which needs a package: pip install -e '\.\[heic\]'"):
        picture.decode(box(b"heic"), "a.heic")
    monkeypatch.setattr(picture.features, "check", lambda name: name != "avif")
    with pytest.raises(ValueError, match=r"a\.avif is AVIF, which this build of Pillow does not read"):
        picture.decode(box(b"avif"), "a.avif")


def test_avif_is_read_as_it_was_written() -> None:
    if not picture.features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    drawn = Image.linear_gradient("L").convert("RGB")
    file = io.BytesIO()
    drawn.save(file, "AVIF", quality=95)
    apart = np.asarray(picture.decode(file.getvalue(), "a.avif"), float) - np.asarray(drawn, float)
    assert abs(apart).max() < 8


def test_heic_is_read_with_its_package() -> None:
    heif = pytest.importorskip("pillow_heif")
    drawn = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    drawn.paste("red", (0, 0, 16, 48))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    heif.from_pillow(drawn).save(file, quality=95, exif=exif.tobytes())
    upright = picture.decode(file.getvalue(), "a.heic")
    expected = np.asarray(drawn, float)
    got = np.asarray(upright, float)
    if got.shape != expected.shape:  # turned by what its EXIF says
        expected = np.rot90(expected, -1)
    assert got.shape == expected.shape and abs(got - expected).mean() < 4
    assert picture.pixels_of(file.getvalue()) == 64 * 48
