"""Masks that cannot be used."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from scripts.bad.case import Case, colours, good
from scripts.bad.pictures import BASE, encoded, png

MASKED = [*BASE, "data.masks=masks"]


def one(name: str, damage: Callable[[Path], object], said: str) -> Case:
    """Good masks, and a fifth picture whose mask is this."""

    def make(folder: Path) -> list[str]:
        good(folder / "set")
        Path("masks").mkdir()
        for i in range(4):
            Image.new("L", (64, 64), 200 + i).save(f"masks/good-{i}.png")
        colours(9).save("set/bad.png")
        Path("set/bad.txt").write_text("a caption")
        damage(Path("masks"))
        return MASKED

    return Case("mask", name, make, said, skips=True)


def _all(masks: str, folder: Path) -> list[str]:
    good(folder / "set")
    Path("file").write_text("")
    Path("void").mkdir()
    return [*BASE, f"data.masks={masks}"]


def _save(picture: Image.Image, name: str = "bad.png") -> Callable[[Path], object]:
    return lambda masks: picture.save(masks / name)


def _write(content: bytes, name: str = "bad.png") -> Callable[[Path], object]:
    return lambda masks: (masks / name).write_bytes(content)


def _links(masks: Path) -> None:
    Image.new("L", (64, 64), 9).save("outside.png")
    (masks / "bad.png").symlink_to("../outside.png")


def _extra(masks: Path) -> None:
    Image.new("L", (64, 64), 255).save(masks / "bad.png")
    Image.new("L", (64, 64), 255).save(masks / "other.png")


def _twice(masks: Path) -> None:
    for ending in ("jpg", "bmp"):
        Image.new("L", (64, 64), 9).save(masks / f"bad.{ending}")


def cases() -> Iterator[Case]:
    broken, shape = "mask.*cannot be read as a picture", "mask.*give both the same shape"
    yield one("there is none", lambda _: None, r"bad\.png has no mask in masks")
    yield one(
        "by another name", _save(Image.new("L", (64, 64), 255), "bad-mask.png"), r"bad\.png has no mask|no picture"
    )
    yield one(
        "two for one picture",
        _twice,
        r"bad\.(png has no mask|jpg is the mask of no|bmp is the mask of no)",
    )
    yield one("one too many", _extra, r"other\.png is the mask of no picture")
    yield one("black", _save(Image.new("L", (64, 64))), "mask.*is black all over")
    yield one("transparent", _save(Image.new("RGBA", (64, 64), (255, 255, 255, 0))), "mask.*is black all over")
    yield one("wider", _save(Image.new("L", (128, 64), 255)), shape)
    yield one("higher", _save(Image.new("L", (64, 100), 255)), shape)
    yield one("one pixel", _save(Image.new("L", (1, 90), 255)), shape)
    yield one("empty", _write(b""), broken)
    yield one("text", _write(b"white"), broken)
    yield one("half a file", _write(encoded("jpg")[:400], "bad.jpg"), broken)
    yield one("half a PNG", _write(encoded("png")[:400]), broken)
    yield one("of 100000x100000", _write(png(100000, 100000)), "mask.*(too large|cannot be read)")
    yield one("32-bit numbers", lambda m: Image.new("I", (64, 64), 9).save(m / "bad.tif", "TIFF"), "mask.*32 bits")
    yield one("an SVG drawing", _write(b"<svg/>", "bad.svg"), r"bad\.(svg is of a format|png has no mask)")
    yield one("a link out of the folder", _links, r"bad\.png (is a link out|has no mask)")
    yield one("a named pipe", lambda m: os.mkfifo(m / "bad.png"), r"bad\.png (is no file|has no mask)")
    for name, masks, said in (
        ("a folder that is not there", "nowhere", "'nowhere' of set is no folder"),
        ("a file", "file", "'file' of set is no folder"),
        ("an empty folder", "void", r"good-0\.png has no mask in void"),
    ):
        yield Case("mask", name, lambda folder, masks=masks: _all(masks, folder), said)  # type: ignore[misc]
