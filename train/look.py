"""A look at the data before training: what is there, what is broken, and every crop as the trainer will see it.

    python train/look.py model=dev data.path=my_pictures data.resolution=512 run=mine

Takes train.py's data options, prints a summary and writes runs/<run>/data.html, which opens offline, and data.json for
programs; json=true prints the counts as a JSON object below. Exit code 0: training could start; 2: it could not, and
the text says what to mend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import infer  # noqa: F401  which says what is amiss outside of the environment

from tqdm import tqdm

from infer.checkpoint.family import family_of
from infer.checkpoint.files import part_folder
from infer.checkpoint.headers import check_model
from infer.checkpoint.model import Model
from infer.program.atomic import replace_file
from infer.program.bounds import PIXELS, check_most
from infer.program.command import run_command
from infer.program.quiet import ready
from infer.program.run_names import check_run_name
from train.data.dataset import Data, sources_of
from train.data.samples import check_left, read_samples
from train.data.split import split
from train.latents.workers import make_room, own_cores

if TYPE_CHECKING:
    from train.survey.survey import Survey

WIDTH = 160  # characters of a line in the terminal
LINES = 20  # of each list in the terminal; the page has them all
CHUNK = 1000  # texts tokenized at once


@dataclass
class Look:
    """What to look at."""

    model: Model = field(default_factory=Model)
    """Its tokenizer counts the captions' tokens; nothing else of it is needed."""
    data: Data = field(default_factory=Data)
    run: str = "train"
    """The page is runs/<run>/data.html."""
    shown: int = 120
    """Pictures whose crops are on the page; the table has all."""
    workers: int | None = None
    """Threads that decode; null takes one a core."""
    json: bool = False
    """Print the counts as JSON too, as the last line."""
    decode_pixels: int = 2**26
    """Pixels decoded at the same time by all threads, at 8 to 21 bytes each; a larger picture is decoded alone."""

    def __post_init__(self) -> None:
        check_most(self, "", shown=10**6, workers=1024, decode_pixels=PIXELS)
        for name in ("shown", "decode_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be 1 or more, or null")


def token_counter(model: Model) -> tuple[Callable[[list[str]], list[int]], int]:
    """What counts the text tokens of texts, the end mark included, and the checkpoint's own length.

    Raises:
        ValueError: the tokenizer is not here and cannot be downloaded.
    """
    check_model(model)
    from transformers import AutoTokenizer

    family = family_of(model)
    (part,) = (encoder.tokenizer for encoder in family.ENCODERS if encoder.large)
    folder = part_folder(model, part)
    try:
        parts: dict[str, Any] = {part: AutoTokenizer.from_pretrained(folder, trust_remote_code=False)}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer in {folder}: {str(error).splitlines()[0]}") from error

    def count(texts: list[str]) -> list[int]:
        chunks = (texts[first : first + CHUNK] for first in range(0, len(texts), CHUNK))
        return [tokens for chunk in chunks for tokens in family.count_tokens(parts, chunk)]

    return count, family.text_length(parts)


def refusal(found: Survey, data: Data) -> str | None:
    """Why training could not start on this, and the mend; None if it could."""
    if found.skipped and data.on_error == "raise":
        total = len(found.usable) + len(found.skipped)
        leave = ", or set data.on_error=skip to train without them" if found.usable else ""
        return f"{len(found.skipped)} of {total} samples cannot be used, for the reasons above; mend them{leave}"
    usable = [found.samples[i] for i in found.usable]
    given = sources_of(data)
    keys = [
        p.pixels
        for sample, p in zip(found.samples, found.pictures, strict=True)
        if p and not given[sample.source].prior
    ]
    try:
        check_left(data, usable, found.skipped)
        split(keys, data.validation, 0)  # any seed: whether it can be split depends on the pictures alone
    except ValueError as error:
        return str(error)
    return None


def counts(found: Survey) -> dict[str, Any]:
    """The survey in numbers, as JSON has them."""
    from train.survey.survey import reasons, sources

    buckets = found.buckets()
    fits = [fits for i in found.usable if (fits := found.fits[i])]
    return {
        "samples": len(found.usable),
        "skipped": len(found.skipped),
        "reasons": reasons(found),
        "masks": sum(masks for _, _, masks in sources(found)),
        "with_references": sum(bool(found.samples[i].references) for i in found.usable),
        "buckets": {f"{resolution}: {w}x{h}": len(inside) for (resolution, w, h), inside in buckets.items()},
        "smaller": sum(any(fit.smaller for fit in of_one) for of_one in fits),
        "enlarged": sum(any(fit.scale > 1 for fit in of_one) for of_one in fits),
        "exact_duplicates": sum(len(group) - 1 for group in found.copies),
        "near_duplicates": sum(len(group) - 1 for group in found.near.groups),
        "texts": len({text for i in found.usable for text in found.texts[i]}),
        "truncated": None if found.lengths is None else len(found.truncated),
        "without_trigger": len(found.untriggered),
        "shared_captions": len(found.shared),
    }


def _plain(text: str) -> str:
    """Text as one short line that does nothing to the terminal."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 3]}..."


def summary(found: Survey, numbers: dict[str, Any]) -> str:
    """The survey as text for the terminal."""
    lines = [f"{numbers['samples']:,} pictures to train with, {numbers['skipped']:,} left out"]

    def listed(title: str, entries: list[str]) -> None:
        if entries:
            lines.append(title)
            lines.extend(f"  {_plain(entry)}" for entry in entries[:LINES])
            if len(entries) > LINES:
                lines.append(f"  and {len(entries) - LINES:,} more, on the page")

    listed("left out:", [f"{skipped.name} {skipped.reason}" for skipped in found.skipped])
    rows = []
    for (resolution, width, height), fits in found.buckets().items():
        cut = sum(fit.cut for fit in fits) / len(fits)
        size, count = f"{width} x {height}", f"{len(fits):,}"
        rows.append(f"{size:>11}  {count:>7}  at {resolution}, {100 * cut:.1f} % cut away in the mean")
    listed("buckets, width x height, and their pictures:", rows)
    names = [sample.name for sample in found.samples]
    listed("same pixels:", [", ".join(names[i] for i in group) for group in found.copies])
    listed("nearly the same:", [", ".join(names[i] for i in group) for group in found.near.groups])
    if found.near.looked_at < found.near.candidates:
        lines.append(f"{found.near.looked_at:,} of {found.near.candidates:,} pairs that are alike were compared")
    for key, what in (
        ("masks", "with a mask"),
        ("with_references", "with references"),
        ("smaller", "smaller than asked, trained at their own size"),
        ("enlarged", "enlarged"),
        ("without_trigger", "without the trigger, which is put before their captions"),
    ):
        if numbers[key]:
            lines.append(f"{numbers[key]:,} {what}")
    if numbers["shared_captions"]:
        lines.append(f"{numbers['shared_captions']:,} captions stand for several pictures")
    if found.lengths:
        most = max(found.lengths.values())
        seen = f"the text encoder sees the first {found.length:,}"
        lines.append(f"{numbers['texts']:,} texts of up to {most:,} text tokens; {seen}")
        listed("truncated:", [f"{found.lengths[text]:,} tokens: {text}" for text in found.truncated])
    return "\n".join(lines)


def look(options: Look) -> None:
    """Print the summary, write the page, and leave with exit code 2 if training could not start."""
    data = options.data
    page = check_run_name(options.run) / "data.html"
    # all that is broken is listed, whatever training does at the first of it
    samples, skipped = read_samples(replace(data, on_error="skip"))
    ready()
    from train.survey.record import NAME, record
    from train.survey.sheet import render
    from train.survey.survey import survey

    count_tokens, length, absent = None, None, ""
    try:
        count_tokens, length = token_counter(options.model)
        length = data.text_length or length
    except ValueError as error:
        absent = f"text tokens are not counted: {error}"
    workers, room = options.workers or own_cores(), make_room(options.decode_pixels)
    with tqdm(total=len(samples), desc="reading pictures", unit="picture") as bar:
        found = survey(data, samples, skipped, count_tokens, length, workers, room, bar.update)
    why_not, numbers = refusal(found, data), counts(found)
    facts = {
        "data": ", ".join(source.path for source in sources_of(data) if source.path),
        "pictures": f"{numbers['samples']:,} to train with, {numbers['skipped']:,} left out",
        "resolution": ", ".join(map(str, data.resolutions)),
        "text tokens": absent or f"{length} are seen of each text, by the tokenizer of {options.model.path}",
    }
    if data.prior.count:
        facts["prior preservation"] = f"{data.prior.count} pictures that the base draws are not here yet"
    content = render(f"Data of {options.run}", facts, why_not, found, data, options.shown, workers, room)
    replace_file(page, lambda path: path.write_bytes(content.encode()))
    listed = json.dumps(record(found, data, why_not, numbers), ensure_ascii=False)
    replace_file(page.with_name(NAME), lambda path: path.write_text(listed, encoding="utf-8"))
    print(summary(found, numbers))
    if absent:
        print(absent)
    print(f"page: {page}")
    print("training can start on this data" if why_not is None else f"training cannot start: {why_not}")
    if options.json:
        print(json.dumps({"can_start": why_not is None, **numbers, "page": str(page)}, ensure_ascii=False), flush=True)
    if why_not is not None:
        sys.exit(2)


if __name__ == "__main__":
    run_command("look", Look, look)
