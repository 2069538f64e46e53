"""Parquet and Arrow files, and folders of them, that cannot be used."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.bad.case import Case, colours
from scripts.bad.pictures import BASE

TABLE = [*BASE, "data.path=set.parquet"]


def content(i: int) -> bytes:
    buffer = io.BytesIO()
    colours(i).save(buffer, "PNG")
    return buffer.getvalue()


def rows(bad: dict[str, Any] | None = None) -> dict[str, list[Any]]:
    """Four good rows, and one of these values."""
    good = [{"image": {"bytes": content(i), "path": None}, "text": f"a picture of colours, {i}"} for i in range(4)]
    every = good if bad is None else [*good, {**good[0], **bad}]
    return {name: [row[name] for row in every] for name in every[0]}


def write(columns: dict[str, Any], file: Path = Path("set.parquet")) -> None:
    pq.write_table(pa.table(columns), file)


def row(name: str, bad: dict[str, Any], said: str) -> Case:
    def make(folder: Path) -> list[str]:
        write(rows(bad))
        return TABLE

    return Case("table", f"row: {name}", make, said, skips=True)


def column(name: str, columns: Callable[[], dict[str, Any]], said: str, *more: str) -> Case:
    def make(folder: Path) -> list[str]:
        write(columns())
        return [*TABLE, *more]

    return Case("table", f"column: {name}", make, said)


def _bytes(data: bytes, name: str, folder: Path) -> list[str]:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(data)
    return [*BASE, f"data.path={name}"]


def _cut(share: float, folder: Path) -> list[str]:
    write(rows())
    whole = Path("set.parquet").read_bytes()
    Path("set.parquet").write_bytes(whole[: int(len(whole) * share)])
    return TABLE


def _flipped(place: float, folder: Path) -> list[str]:
    write(rows())
    whole = bytearray(Path("set.parquet").read_bytes())
    for i in range(8):
        whole[int(len(whole) * place) + i] ^= 0xFF
    Path("set.parquet").write_bytes(whole)
    return TABLE


def _renamed(folder: Path) -> list[str]:
    write(rows())
    Path("set.parquet").rename("set.arrow")
    return [*BASE, "data.path=set.arrow"]


def _beside_pictures(folder: Path) -> list[str]:
    Path("set").mkdir()
    write(rows(), Path("set/a.parquet"))
    colours(1).save("set/a.png")
    return [*BASE, "data.path=set"]


def _unlike(folder: Path) -> list[str]:
    Path("set").mkdir()
    write(rows(), Path("set/a.parquet"))
    write({"image": [1, 2], "text": [3, 4]}, Path("set/b.parquet"))
    return [*BASE, "data.path=set"]


def _saved(damage: Callable[[Path], object], folder: Path) -> list[str]:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows()).save_to_disk("saved")
    datasets.enable_progress_bars()
    damage(Path("saved"))
    return [*BASE, "data.path=saved"]


def cases() -> Iterator[Case]:
    broken = "datasets cannot load it"
    for name, data in (("empty", b""), ("text", b"image,text\na,b\n"), ("its mark alone", b"PAR1PAR1")):
        for ending in ("parquet", "arrow"):
            yield Case("table", f"{ending} file: {name}", partial(_bytes, data, f"set.{ending}"), broken)
    yield Case("table", "a folder of an empty parquet file", partial(_bytes, b"", "set/a.parquet"), broken)
    for share in (0.1, 0.5, 0.95):
        yield Case("table", f"cut to {share}", partial(_cut, share), broken)
    for place in (0.3, 0.993):
        said = rf"{broken}|cannot be read as a picture|cannot be read"
        yield Case("table", f"8 bytes changed at {place}", partial(_flipped, place), said)
    yield Case("table", "parquet named .arrow", _renamed, broken)
    yield Case("table", "beside pictures", _beside_pictures, "pictures beside tables")
    yield Case("table", "two tables that differ", _unlike, f"{broken}|holds no pictures")
    yield Case("table", "a table that is not there", lambda _: [*BASE, "data.path=none.parquet"], "does not exist")
    yield Case("table", "a data set of the Hub, offline", lambda _: [*BASE, "data.path=no-one/nothing"], broken)
    yield Case("table", "masks", lambda _: [*BASE, "data.path=a.parquet", "data.masks=m"], "can have masks")

    yield column(
        "no rows",
        lambda: {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())},
        "set.parquet|nothing is left",
    )
    yield column("no image", lambda: {"picture": [content(1)], "text": ["a"]}, "no column 'image'.*data.image_column")
    yield column("no text", lambda: {"image": rows()["image"], "words": rows()["text"]}, "no column 'text'")
    yield column("a misspelt column", rows, "no column 'imge'", "data.image_column=imge")
    yield column("whole numbers for pictures", lambda: {**rows(), "image": [1, 2, 3, 4]}, "holds no pictures")
    yield column("lists for pictures", lambda: {**rows(), "image": [[1.5]] * 4}, "holds no pictures|32 bits")
    yield column("truth for pictures", lambda: {**rows(), "image": [True] * 4}, "holds no pictures")
    yield column("numbers for texts", lambda: {**rows(), "text": [1, 2, 3, 4]}, r"parquet\[0\] has 1 as text, not text")
    yield column("bytes for texts", lambda: {**rows(), "text": [b"a"] * 4}, r"parquet\[0\] has b'a' as text, not text")
    yield column("objects for texts", lambda: {**rows(), "text": [{"a": 1}] * 4}, r"parquet\[0\] has .* as text")
    yield column(
        "another split", rows, "datasets cannot load it", "data.path=''", "data.sources=[{path:set.parquet,split:test}]"
    )
    yield column(
        "a split that cannot be read",
        rows,
        "datasets cannot load it",
        "data.path=''",
        "data.sources=[{path:set.parquet,split:'train[abc:]'}]",
    )

    yield row("no picture", {"image": None}, r"parquet\[4\] cannot be read as a picture \(there is none")
    yield row("an empty picture", {"image": {"bytes": b"", "path": None}}, r"parquet\[4\] cannot be read as a picture")
    yield row("neither bytes nor path", {"image": {"bytes": None, "path": None}}, r"parquet\[4\] cannot be read")
    yield row(
        "bytes of no picture", {"image": {"bytes": b"abc", "path": None}}, r"parquet\[4\] cannot be read as a pic"
    )
    yield row("half a picture", {"image": {"bytes": content(9)[:200], "path": None}}, r"parquet\[4\] cannot be read as")
    yield row(
        "a path to nothing", {"image": {"bytes": None, "path": "no.png"}}, r"parquet\[4\] cannot be read as a pic"
    )
    yield row("a path that leads out", {"image": {"bytes": None, "path": "../x.png"}}, r"parquet\[4\] names .*outside")
    yield row("an absolute path", {"image": {"bytes": None, "path": "/etc/passwd"}}, r"parquet\[4\] names .*outside")
    yield row("a path to itself", {"image": {"bytes": None, "path": "set.parquet"}}, r"parquet\[4\] cannot be read as")
    yield row("no text", {"text": None}, r"parquet\[4\] has None as text")
    yield row("an empty text", {"text": ""}, r"parquet\[4\] has (an empty|no) caption")
    yield row("spaces for text", {"text": " \n"}, r"parquet\[4\] has (an empty|no) caption")

    for name, damage, said in (
        ("a state that is no JSON", lambda f: (f / "state.json").write_text("{"), broken),
        ("a state of nothing", lambda f: (f / "state.json").write_text("{}"), broken),
        ("infos that are a list", lambda f: (f / "dataset_info.json").write_text("[]"), broken),
        ("no data", lambda f: next(f.glob("*.arrow")).unlink(), broken),
        ("cut data", lambda f: next(f.glob("*.arrow")).write_bytes(b"ARROW1"), broken),
    ):
        yield Case("table", f"save_to_disk: {name}", partial(_saved, damage), said)
