"""One bad input: how it is made, the command that meets it, and what the command has to say."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from PIL import Image

Work = Callable[[list[str]], Any]
TINY = ["precision=nf4", "device=cpu"]
LONGEST = 60  # seconds
ENDED = {1: "a defect", 2: "an error", 0: "no error"}


@dataclass(frozen=True)
class Case:
    """One bad input."""

    kind: str
    name: str
    make: Callable[[Path], list[str]]
    """Writes the input below the working folder that it is given; returns what the command is told."""
    said: str
    """A regular expression that the message matches, in one line."""
    command: str = "cache"
    skips: bool = False
    """The input is a sample beside good ones: data.on_error=skip must leave it out, name it, and go on."""


def colours(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of its own."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    small = Image.frombytes("RGB", (3, 3), digest[:27])
    return small.resize(size, Image.Resampling.BICUBIC)


def good(folder: Path, count: int = 4) -> Path:
    """Pictures with captions, which are the same in every case, so that they are encoded once."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colours(i).save(folder / f"good-{i}.png")
        (folder / f"good-{i}.txt").write_text(f"a picture of colours, number {i}")
    return folder


def listed(folder: Path, lines: list[Any], count: int = 4) -> Path:
    """Good pictures in a metadata.jsonl, and further lines: text as it is, the rest as JSON."""
    good(folder, count)
    own = [{"file_name": f"good-{i}.png", "text": f"a picture of colours, number {i}"} for i in range(count)]
    for file in folder.glob("*.txt"):
        file.unlink()
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in [*own, *lines])
    (folder / "metadata.jsonl").write_text(text + "\n")
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command did with a case."""

    code: int
    said: str
    changed: list[str]
    """Input files that are others now."""
    left: list[str]
    """Files that no command may leave."""


def prints(folder: Path) -> dict[str, str]:
    """What every file is, by name; links are not followed."""
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            file = Path(base, name)
            if file.is_symlink() or not file.is_file():
                continue
            found[os.fsencode(file.relative_to(folder)).decode(errors="replace")] = hashlib.sha256(
                file.read_bytes()
            ).hexdigest()
    return found


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _too_long(*_: Any) -> None:
    raise KeyboardInterrupt(f"it hung for {LONGEST} s")


def meet(work: Work, arguments: list[str]) -> Outcome:
    """Run a command in this process, in the working folder, as its own process would."""
    before = prints(Path())
    buffer = io.BytesIO()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST)
    output = io.TextIOWrapper(buffer, encoding="utf-8", write_through=True)  # as strict as a terminal's
    errors = io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", write_through=True)
    code = 0
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            work(arguments)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        except BaseException as error:  # what would be a raw traceback
            code = 99
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            signal.alarm(0)
            GlobalHydra.instance().clear()
    after = prints(Path())
    changed = [name for name, mark in before.items() if after.get(name) != mark]
    new = [name for name in after if name not in before]
    left = [name for name in new if "partial" in name]
    if code:
        left += [name for name in new if re.match(r"out/|runs/[^/]+/(adapter|compare|checkpoints)/", name)]
    return Outcome(code, buffer.getvalue().decode(errors="replace"), changed, left)


def judge(case: Case, work: Work, cache: Path) -> list[str]:
    """What is wrong with how a case ends; nothing if all is as it must be."""
    wrong = []
    for skip in (False, True) if case.skips else (False,):
        with tempfile.TemporaryDirectory(prefix="bad-") as name, inside(Path(name)):
            arguments = case.make(Path())
            if case.command in ("cache", "train", "look"):
                arguments = [f"data.cache={cache}", *arguments, *(["data.on_error=skip"] if skip else [])]
            outcome = meet(work, arguments)
        said = outcome.said.replace("\r", "\n")
        if skip:
            if outcome.code != 0:
                wrong.append(f"with on_error=skip: {ENDED.get(outcome.code, 'a traceback')}, {_end(said)}")
            elif not any(re.search(case.said, line) for line in said.split("\n") if line.startswith("skipped: ")):
                wrong.append(f"with on_error=skip: it is not named, {_end(said)}")
        elif outcome.code != 2:
            wrong.append(f"{ENDED.get(outcome.code, 'a traceback')}, {_end(said)}")
        else:
            paragraphs = [line for line in said.split("\n") if line.startswith(("error: ", "training cannot start: "))]
            if len(paragraphs) != 1:
                wrong.append(f"{len(paragraphs)} paragraphs, {_end(said)}")
            elif not re.search(case.said, paragraphs[0]):
                wrong.append(f"another message: {paragraphs[0][:300]}")
        if "Traceback (most recent" in said:
            wrong.append(f"a raw traceback, {_end(said)}")
        if outcome.changed:
            wrong.append(f"it changed {', '.join(outcome.changed[:3])}")
        if outcome.left:
            wrong.append(f"it left {', '.join(outcome.left[:3])}")
    return wrong


def _end(said: str) -> str:
    return " / ".join(line for line in said.split("\n") if line.strip())[-400:] or "no word"
