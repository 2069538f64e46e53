"""Captions and metadata that cannot be used: text files beside pictures, metadata.jsonl and metadata.csv."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bad.case import Case, colours, good, listed
from scripts.bad.pictures import BASE

NONE = r"no caption|empty|no line|file_name"


def beside(name: str, content: bytes | None, said: str, *more: str) -> Case:
    """A picture whose .txt file holds this."""

    def make(folder: Path) -> list[str]:
        file = good(folder / "set") / "bad.png"
        colours(8).save(file)
        if content is not None:
            file.with_suffix(".txt").write_bytes(content)
        return [*BASE, *more]

    return Case("caption", f"text file: {name}", make, said, skips=True)


def line(name: str, entry: Any, said: str, *more: str) -> Case:
    """A metadata.jsonl with this line besides, and the picture bad.png if the line names it."""

    def make(folder: Path) -> list[str]:
        listed(folder / "set", [entry])
        if "bad.png" in str(entry) and ".." not in str(entry):
            colours(8).save(folder / "set" / "bad.png")
        return [*BASE, *more]

    return Case("caption", f"metadata.jsonl: {name}", make, said, skips=True)


def whole(name: str, file: str, content: bytes, said: str, *more: str) -> Case:
    """A metadata file that is this and nothing else."""

    def make(folder: Path) -> list[str]:
        for text in good(folder / "set").glob("*.txt"):
            text.unlink()
        (folder / "set" / file).write_bytes(content)
        return [*BASE, *more]

    return Case("caption", f"{file}: {name}", make, said)


def _placed(prepare: Callable[[Path], Any], folder: Path) -> list[str]:
    prepare(good(folder / "set"))
    return BASE


def _text_is_folder(folder: Path) -> None:
    colours(8).save(folder / "bad.png")
    (folder / "bad.txt").mkdir()


def _text_is_link_out(folder: Path) -> None:
    colours(8).save(folder / "bad.png")
    (folder.parent / "secret.txt").write_text("a secret")
    (folder / "bad.txt").symlink_to("../secret.txt")


def _two_captions(folder: Path) -> None:
    colours(8).save(folder / "bad.png")
    (folder / "bad.TXT").write_text("one")
    (folder / "bad.txt").write_text("another")


def _contradicting(folder: Path) -> list[str]:
    listed(folder / "set", [{"file_name": "bad.PNG", "text": "one"}])
    colours(8).save(folder / "set" / "bad.png")
    (folder / "set" / "bad.txt").write_text("another")
    return BASE


def _unlisted(folder: Path) -> list[str]:
    listed(folder / "set", [])
    colours(8).save(folder / "set" / "bad.png")
    (folder / "set" / "bad.txt").write_text("a caption")
    return BASE


def _listed_twice(folder: Path) -> list[str]:
    listed(folder / "set", [{"file_name": "in/bad.png", "text": "one"}])
    (folder / "set" / "in").mkdir()
    colours(8).save(folder / "set" / "in" / "bad.png")
    (folder / "set" / "in" / "metadata.jsonl").write_text('{"file_name": "bad.png", "text": "another"}')
    return BASE


def cases() -> Iterator[Case]:
    for name, written, said in (
        ("metadata and text differ", _contradicting, r"bad\.png has one caption in .* and another in .*keep one"),
        ("metadata leaves out what has a text", _unlisted, r"bad\.png has no line in .*but a caption in"),
        (
            "two lists name it",
            _listed_twice,
            r"metadata\.jsonl line 1 names 'bad\.png' a second time|second time, after",
        ),
    ):
        yield Case("caption", name, written, said, skips=True)
    yield Case("caption", "text files in two cases", partial(_placed, _two_captions),
               r"bad\.png could have its caption from any of", skips=True)  # fmt: skip
    yield beside("there is none", None, r"bad\.png .*no caption")
    yield beside("empty", b"", r"bad\.png .*(empty|no caption)")
    yield beside("spaces and line ends", b" \t\r\n \n", r"bad\.png .*(empty|no caption)")
    yield beside("a byte order mark alone", b"\xef\xbb\xbf", r"bad\.png .*(empty|no caption)")
    yield beside("Latin-1", "größer".encode("latin-1"), r"bad\.png .*UTF-8")
    yield beside("UTF-16", "a caption".encode("utf-16"), r"bad\.png .*UTF-8")
    yield beside("a picture", b"\x89PNG\r\n\x1a\n\x00\xff\xfe", r"bad\.png .*UTF-8")
    yield beside("half a letter", b"a caption \xe6\x97", r"bad\.png .*UTF-8")
    yield beside("a surrogate", b"a \xed\xa0\x80 b", r"bad\.png .*UTF-8")
    yield beside("empty lines, each a caption", b"\n \n", r"bad\.png .*(empty|no caption)", "data.caption_lines=true")
    for name, make, said in (
        ("a folder", _text_is_folder, r"bad\.(txt|png) .*(is no file|no caption)"),
        ("a link out of the folder", _text_is_link_out, r"bad\.(txt|png) .*(link out|no caption)"),
    ):
        yield Case("caption", f"text file: {name}", partial(_placed, make), said, skips=True)

    for name, entry, said in (
        ("no JSON", "{file_name: bad.png}", "line 5"),
        ("cut in the middle", '{"file_name": "bad.png", "te', "line 5"),
        ("single quotes", "{'file_name': 'bad.png', 'text': 'a'}", "line 5"),
        ("a comma at the end", '{"file_name": "bad.png", "text": "a",}', "line 5"),
        ("two objects", '{"file_name": "bad.png", "text": "a"} {}', "line 5"),
        ("nested too deep", "[" * 100_000, "line 5"),
        ("a number of 5,000 digits", '{"file_name": "bad.png", "text": ' + "1" * 5000 + "}", "line 5"),
        ("a list", ["bad.png", "a"], "line 5"),
        ("a number", 3, "line 5"),
        ("text", "bad.png", "line 5"),
        ("null", "null", "line 5"),
        ("not a number", "NaN", "line 5"),
        ("an empty object", {}, "line 5"),
        ("no file_name", {"text": "a"}, "line 5"),
        ("no text", {"file_name": "bad.png"}, "line 5"),
        ("another column", {"file_name": "bad.png", "caption": "a"}, "line 5"),
        ("another case", {"File_Name": "bad.png", "Text": "a"}, "line 5"),
        ("text is null", {"file_name": "bad.png", "text": None}, "line 5"),
        ("text is a number", {"file_name": "bad.png", "text": 3}, "line 5"),
        ("text is an object", {"file_name": "bad.png", "text": {"a": 1}}, "line 5"),
        ("text is an empty list", {"file_name": "bad.png", "text": []}, "line 5"),
        ("a list with null", {"file_name": "bad.png", "text": ["a", None]}, "line 5"),
        ("a list in a list", {"file_name": "bad.png", "text": [["a"]]}, "line 5"),
        ("text is empty", {"file_name": "bad.png", "text": ""}, r"bad\.png .*(empty|no caption)"),
        ("text is spaces", {"file_name": "bad.png", "text": "  "}, r"bad\.png .*(empty|no caption)"),
        ("a list of empty texts", {"file_name": "bad.png", "text": ["", " "]}, r"bad\.png .*(empty|no caption)"),
        ("half a letter in text", r'{"file_name": "bad.png", "text": "a \ud800 b"}', r"bad\.png|line 5"),
        ("file_name is null", {"file_name": None, "text": "a"}, "line 5"),
        ("file_name is a number", {"file_name": 7, "text": "a"}, "line 5"),
        ("file_name is a list", {"file_name": ["bad.png"], "text": "a"}, "line 5"),
        ("file_name is empty", {"file_name": "", "text": "a"}, r"line 5|names '"),
        ("file_name is the folder", {"file_name": ".", "text": "a"}, r"line 5|names '"),
        ("file_name is absent", {"file_name": "other.png", "text": "a"}, "names 'other.png', which is not in"),
        ("file_name leads out", {"file_name": "../x.png", "text": "a"}, r"names '\.\./x\.png', outside"),
        ("file_name leads out and back", {"file_name": "a/../../set/bad.png", "text": "a"}, "outside"),
        ("file_name is absolute", {"file_name": "/etc/passwd", "text": "a"}, "names '/etc/passwd', outside"),
        ("file_name with a NUL", r'{"file_name": "a\u0000.png", "text": "a"}', r"line 5|names 'a\\x00"),
        ("file_name with half a letter", r'{"file_name": "\udcff.png", "text": "a"}', r"line 5|names '\\udcff"),
        ("file_name of 5,000 letters", {"file_name": "a" * 5000 + ".png", "text": "a"}, "names 'aaa"),
        ("a second line for a picture", {"file_name": "good-1.png", "text": "b"}, "good-1.png' a second time"),
        ("the same by another name", {"file_name": "./good-1.png", "text": "b"}, "good-1.png' a second time"),
        ("of another kind of file", {"file_name": "metadata.jsonl", "text": "b"}, "names 'metadata.jsonl'"),
    ):
        yield line(name, entry, said)
    yield line("a picture without a line", {"file_name": "good-0.png", "text": "x"}, r"bad\.png .*no line|second time")
    alone = b'{"file_name": "good-0.png", "text": "a"}\n'
    yield whole("a column that is not there", "metadata.jsonl", alone, "words", "data.caption_column=words")

    for name, content, said in (
        ("empty", b"", NONE),
        ("empty lines", b"\n\n\n", NONE),
        ("Latin-1", '{"file_name": "good-0.png", "text": "größer"}'.encode("latin-1"), "not UTF-8"),
        ("UTF-16", json.dumps({"file_name": "good-0.png", "text": "a"}).encode("utf-16"), "not UTF-8"),
        ("a ZIP archive", b"PK\x03\x04\xff\xfe" + bytes(80), "not UTF-8"),
        ("one JSON list over lines", b'[\n{"file_name": "good-0.png", "text": "a"},\n]\n', "line 1"),
    ):
        yield whole(name, "metadata.jsonl", content, said)
    head, rest = b"file_name,text\n", b"".join(b"good-%d.png,a %d\n" % (i, i) for i in range(4))
    for name, content, said in (
        ("empty", b"", NONE),
        ("only a header", head, NONE),
        ("no header", rest, r"line 2"),
        ("no column text", b"file_name,words\ngood-0.png,a\n", "line 2"),
        ("no column file_name", b"name,text\ngood-0.png,a\n", "line 2"),
        ("semicolons", b"file_name;text\ngood-0.png;a\n", "line 2"),
        ("too many cells", head + b"good-0.png,a,b\n" + rest[13:], "line 2 has more cells"),
        ("too few cells", head + b"good-0.png\n" + rest[13:], "line 2"),
        ("a quote that never ends", head + rest + b'good-9.png,"a\n', "is no CSV"),
        ("a stray quote", head + rest + b'good-9.png,"a" b\n', "is no CSV"),
        ("a cell of 200,000 letters", head + rest + b"good-9.png," + b"a" * 200_000 + b"\n", "is no CSV"),
        ("Latin-1", head + "good-0.png,größer\n".encode("latin-1"), "not UTF-8"),
        ("an absent picture", head + rest + b"good-9.png,a\n", "names 'good-9.png', which is not in"),
        ("a line twice", head + rest + b"good-1.png,b\n", "good-1.png' a second time"),
        ("leads out", head + rest + b"../good-1.png,b\n", "outside"),
        ("an empty caption", head + rest.replace(b"a 2", b""), r"good-2\.png .*(empty|no caption)"),
    ):
        yield whole(name, "metadata.csv", content, said)

    def both(folder: Path) -> None:
        (folder / "metadata.jsonl").write_text("")
        (folder / "metadata.csv").write_text("")

    yield Case("caption", "metadata.jsonl and metadata.csv", partial(_placed, both), "holds both")
