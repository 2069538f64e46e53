"""Picture files that cannot be used, one beside four good ones."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from scripts.bad.case import Case, colours, good
from train.data.image_folder import UNREAD

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "tif": "TIFF",
    "bmp": "BMP",
    "gif": "GIF",
    "avif": "AVIF",
    "jp2": "JPEG2000",
}
LEAST_CUT = {"jp2": 4}  # its decoder takes half a file for a coarser picture: cut it to a quarter
BASE = ["data.path=set", "data.resolution=64", "data.validation=0", "device=cpu"]
BROKEN = r"bad\.[a-z0-9]+ (cannot be read as a picture|is too large)"


def encoded(kind: str, picture: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (picture or colours(77, (96, 96))).save(buffer, FORMATS[kind])
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG file."""
    own = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", own)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def resized(kind: str, width: int, height: int) -> bytes:
    """A small file whose header says another size."""
    content = bytearray(encoded(kind))
    if kind == "jpg":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "bmp":
        content[18:26] = struct.pack("<ii", width, height)
    elif kind == "gif":
        content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def _put(content: Callable[[], bytes], name: str, folder: Path) -> list[str]:
    file = good(folder / "set") / name
    file.write_bytes(content())
    file.with_suffix(".txt").write_text("a caption")
    return BASE


def bad(name: str, content: Callable[[], bytes], said: str = BROKEN, file: str = "bad.png", *more: str) -> Case:
    return Case("picture", name, lambda folder: [*_put(content, file, folder), *more], said, skips=True)


def _flat(size: tuple[int, int]) -> bytes:
    return encoded("png", colours(5, size))


def _numbers(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (64, 64)).save(buffer, "TIFF")
    return buffer.getvalue()


def _odd(make: Callable[[Path], object], folder: Path) -> list[str]:
    make(good(folder / "set"))
    return BASE


def _dangling(folder: Path) -> None:
    (folder / "bad.png").symlink_to("nowhere.png")


def _outside(folder: Path) -> None:
    colours(1).save(folder.parent / "outside.png")
    (folder / "bad.png").symlink_to("../outside.png")


def _loop(folder: Path) -> None:
    (folder / "bad.png").symlink_to("bad.png")


def _folder_link(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    (folder / "bad").symlink_to("../other")


def cases() -> Iterator[Case]:
    for ending, kind in FORMATS.items():
        whole, file = partial(encoded, ending), f"bad.{ending}"
        yield bad(f"{kind}: empty", lambda: b"", BROKEN, file)
        yield bad(f"{kind}: 16 bytes of its header", lambda whole=whole: whole()[:16], BROKEN, file)  # type: ignore[misc]
        share = LEAST_CUT.get(ending, 2)
        cut = partial(lambda whole, share: whole()[: len(whole()) // share], whole, share)
        yield bad(f"{kind}: cut to 1/{share}", cut, BROKEN, file)
        yield bad(f"{kind}: zeros", lambda: bytes(3000), BROKEN, file)
        yield bad(
            f"{kind}: noise",
            lambda: b"".join(struct.pack("<I", i * 2654435761 % 2**32) for i in range(500)),
            BROKEN,
            file,
        )
        text = f"<html>404: {file} not found</html>".encode()
        yield bad(f"{kind}: an error page", lambda text=text: text, BROKEN, file)  # type: ignore[misc]
    others = {
        "a ZIP archive": b"PK\x03\x04" + bytes(60),
        "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
        "a film": b"\x00\x00\x00\x20ftypisom" + bytes(60),
        "an SVG drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "a pickle": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x8c\x03abc\x94.",
        "a safetensors file": struct.pack("<Q", 2) + b"{}",
        "a program": b"\x7fELF\x02\x01\x01" + bytes(60),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    }
    for name, content in others.items():
        yield bad(f"{name} named .png", lambda content=content: content)  # type: ignore[misc]
    grey = chunk(b"IDAT", zlib.compress(bytes(64 * 193)))
    yield bad("PNG of 100000x100000 by its header", lambda: png(100000, 100000, grey))
    yield bad("PNG of no width", lambda: png(0, 64, grey))
    yield bad("PNG of no height", lambda: png(64, 0, grey))
    yield bad("PNG of 2^31-1 a side", lambda: png(2**31 - 1, 2**31 - 1, grey))
    yield bad("PNG whose header's checksum is wrong", lambda: png(64, 64, grey).replace(b"IHDR", b"IHDr", 1))
    yield bad("PNG with no pixels", lambda: png(64, 64))
    yield bad("PNG whose pixels are no zlib", lambda: png(64, 64, chunk(b"IDAT", b"x" * 90)))
    yield bad("PNG with too few pixels", lambda: png(64, 64, chunk(b"IDAT", zlib.compress(bytes(500)))))
    yield bad("PNG of an unknown colour type", lambda: png(64, 64, grey, colour=5))
    yield bad("PNG of 7 bits", lambda: png(64, 64, grey, depth=7))
    bomb = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(80_000_000)))
    yield bad("PNG with 80 MB that say how it lies", lambda: png(64, 64, bomb, grey))
    yield bad("PNG cut within a text", lambda: png(64, 64, chunk(b"tEXt", b"workflow\0" + b"a" * 9000), grey)[:6000])
    yield bad("JPEG of 65535x65535 by its header", lambda: resized("jpg", 65535, 65535), BROKEN, "bad.jpg")
    yield bad("JPEG of no height", lambda: resized("jpg", 64, 0), BROKEN, "bad.jpg")
    yield bad("JPEG without pixels", lambda: encoded("jpg")[: encoded("jpg").index(b"\xff\xda")], BROKEN, "bad.jpg")
    yield bad("BMP of 60000x60000 by its header", lambda: resized("bmp", 60000, 60000), BROKEN, "bad.bmp")
    yield bad("BMP of no width", lambda: resized("bmp", 0, 64), BROKEN, "bad.bmp")
    yield bad("GIF of 65535x65535 by its header", lambda: resized("gif", 65535, 65535), BROKEN, "bad.gif")
    for size in ((1, 1), (15, 15), (15, 400), (400, 15), (1, 4000)):
        yield bad(f"{size[0]}x{size[1]} pixels", partial(_flat, size), r"bad\.png .*16")
    yield bad("32-bit whole numbers", partial(_numbers, "I"), r"bad\.tif cannot be read .*32 bits", "bad.tif")
    yield bad("32-bit floating point", partial(_numbers, "F"), r"bad\.tif cannot be read .*32 bits", "bad.tif")
    said = r"bad\.png is too large .*most_pixels=4800"
    yield bad("more than data.most_pixels", partial(_flat, (70, 70)), said, "bad.png", "data.most_pixels=4800")
    for ending in UNREAD:
        said = rf"bad{ending} is of a format that is not read"
        yield bad(f"a {ending} file", lambda: b"anything", said, f"bad{ending}")
    oddities: list[tuple[str, Callable[[Path], object], str]] = [
        ("a link to nowhere", _dangling, r"bad\.png is (no file|a link out)"),
        ("a link out of the folder", _outside, r"bad\.png is a link out of"),
        ("a link to itself", _loop, r"bad\.png"),
        ("a link to a folder", _folder_link, r"bad is a link (to a folder|out of)"),
        ("a named pipe", lambda folder: os.mkfifo(folder / "bad.png"), r"bad\.png is no file"),
    ]
    for name, make, said in oddities:
        yield Case("picture", name, partial(_odd, make), said, skips=True)
    for name, path, said in (
        ("a folder that is not there", "nowhere", "'nowhere' does not exist"),
        ("a file for a folder", "file.png", "'file.png' is a picture; set it to the folder"),
        ("a file in a folder", "files/b.JPG", "'files/b.JPG' is a picture; set it to the folder"),
        ("the list of captions", "files/metadata.jsonl", "is the list of captions; set it to its folder, 'files'"),
        ("an archive", "files/set.zip", "is an archive; unpack it"),
        ("a text", "texts/a.txt", "is a file of a kind that is not read"),
        ("a folder of a folder, with a space", "no such/set", "'no such/set' does not exist"),
        ("an empty folder", "void", "void holds no pictures"),
        ("a folder of texts alone", "texts", "texts holds no pictures"),
    ):
        yield Case("picture", name, partial(_place, path), said)


def _place(path: str, folder: Path) -> list[str]:
    colours(1).save(folder / "file.png")
    (folder / "void").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a")
    for name, content in (("b.JPG", b""), ("metadata.jsonl", b""), ("set.zip", b"PK\3\4" + bytes(30))):
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / name).write_bytes(content)
    return [*BASE, f"data.path={path}"]
