"""One source of pictures with captions, and the samples that it gives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from infer.program.bounds import check_most
from infer.program.paths import expand, expanded
from infer.sample.edit import MOST

POLICIES = ("raise", "skip")


BY_CONTENT = {"may_change": True}  # a resumed run compares the samples that come of it


@dataclass
class Source:
    """Where pictures and captions are, and how much they count: one entry of data.sources."""

    path: str = ""
    """A folder of pictures, a .parquet or .arrow file, a folder of them or of `save_to_disk`, a data set on the
    Hub, or the address of such a folder or file in the cloud (s3://, gs://, hf://)."""
    masks: str | None = None
    """A folder of greyscale pictures of the same names: white counts in the loss, black does not."""
    references: list[str] = field(default_factory=list)
    """Folders of reference pictures of the same names, in their order; of a table, its columns of them."""
    repeats: float = 1.0
    """Times that each of its samples is seen an epoch; a fraction takes turns."""
    weight: float = 1.0
    """What its samples count in the loss."""
    caption: str | None = None
    """The caption of pictures that have none; null refuses them."""
    prior: bool = False
    """Pictures of the class at large (prior preservation): no trigger, prefix or suffix, none held out."""
    image_column: str | None = field(default=None, metadata=BY_CONTENT)
    """The column of the pictures; null takes data.image_column."""
    caption_column: str | None = field(default=None, metadata=BY_CONTENT)
    """The column of the captions; null takes data.caption_column."""
    subset: str | None = field(default=None, metadata=BY_CONTENT)
    """The subset of a data set on the Hub that has several."""
    split: str = field(default="train", metadata=BY_CONTENT)
    """The split of a data set."""

    def __post_init__(self) -> None:
        check_most(self, "data.sources: ", repeats=10**6, weight=10**6)
        expand(self, "path", "masks")
        check_references(f"references of {self.path}", self.references)
        self.references = [expanded(path) for path in self.references]
        if self.prior and self.references:
            raise ValueError(
                f"references of {self.path} are given, but class pictures (prior) have none; leave them out"
            )
        if not self.path:
            raise ValueError("a source has no path; set it to a folder of pictures with captions")
        if not 0 < self.repeats < float("inf"):
            raise ValueError(f"repeats of {self.path} is {self.repeats}; it must be above 0")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight of {self.path} is {self.weight}; it must be above 0")
        if self.masks is not None and not self.masks.strip():
            raise ValueError(f"masks of {self.path} is {self.masks!r}; name their folder, or set it to null")
        if self.caption is not None and not self.caption.strip():
            raise ValueError(f"caption of {self.path} is empty; write one, or set it to null")


def check_references(name: str, paths: list[str]) -> None:
    """Raises:
    ValueError: folders or columns of references are empty, named twice, or too many.
    """
    if len(paths) > MOST:
        raise ValueError(f"{name} has {len(paths)} entries; a sample has {MOST} references at most")
    for path in paths:
        if not path.strip() or paths.count(path) > 1:
            raise ValueError(f"{name} has {path!r}{' twice' * bool(path.strip())}; name each folder once")


class Reference(NamedTuple):
    """A picture that a sample's own is made from."""

    name: str
    """For messages."""
    read: Callable[[], bytes]
    """Its file's bytes. Raises ValueError, naming the file, if they cannot be read."""
    file: Path | None
    """The file that `read` reads and nothing else is in; None where there is none of its own."""


@dataclass(frozen=True)
class Sample:
    """A picture with its captions."""

    name: str
    """Where it came from, for messages and pages."""
    captions: tuple[str, ...]
    """As written, stripped; one or more."""
    source: int
    """Index into the sources."""
    read: Callable[[], bytes]
    """The picture file's bytes. Raises ValueError, naming the file, if they cannot be read."""
    read_mask: Callable[[], bytes] | None = None
    """The mask file's bytes."""
    file: Path | None = None
    """The file that `read` reads and nothing else is in; None where there is none of its own."""
    mask_file: Path | None = None
    """The same of `read_mask`."""
    references: tuple[Reference, ...] = ()
    """In their order; none where it is trained by its text alone."""


@dataclass(frozen=True)
class Skipped:
    """What data.on_error=skip leaves out."""

    name: str
    reason: str


@dataclass
class Faults:
    """What to do with a sample that cannot be used: stop, or note it and go on."""

    on_error: str
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Note a fault; the message reads `name reason`.

        Raises:
            ValueError: the policy is to stop.
        """
        if self.on_error == "raise":
            raise ValueError(f"{name} {reason}")
        self.skipped.append(Skipped(name, reason))


def clean(found: list[str] | None, fallback: str | None, missing: str) -> tuple[str, ...]:
    """Captions stripped; the fallback where there are none.

    Raises:
        ValueError: there are none at all (`missing` says so), or one is empty or no text; the message follows the
            picture's name.
    """
    captions = tuple(caption.strip() for caption in found or ([] if fallback is None else [fallback]))
    if not captions:
        raise ValueError(f"has {missing}")
    if not all(captions):
        raise ValueError("has an empty caption; write one, or take the picture out")
    for caption in captions:
        if any("\ud800" <= letter <= "\udfff" for letter in caption):  # JSON can say half of a letter
            raise ValueError(f"has the caption {caption!a}, which is no text in Unicode; write it again")
    return captions
