"""A folder of pictures with captions -> samples.

Captions come from metadata.jsonl (datasets' imagefolder: `file_name` and `text` a line) or from one .txt file beside
each picture. A Hub data set or a local parquet file is read through `datasets`.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from train.picture import MOST_PIXELS, SUFFIXES, decode, pixel_hash
from train.source import POLICIES, Sample, Skipped, Source

__all__ = ["Data", "Prior", "Sample", "Skipped", "Source", "pixel_hash", "read_samples", "split"]


@dataclass
class Prior:
    """Prior preservation: pictures of the class at large, so that the adapter does not turn all of it into yours."""

    path: str = ""
    """A folder or data set of them; or none, and the quantized base draws `count`."""
    prompt: str = ""
    """The caption of those that have none, and what the base draws; the trigger is not added."""
    count: int = 0
    """Pictures that the base draws; 0 draws none."""
    weight: float = 1.0
    """Of them in the loss."""
    ratio: float = 1.0
    """Class pictures seen for each training picture."""
    steps: int = 28
    guidance: float = 3.5
    seed: int = 0
    """Of the drawing: the picture i has seed + i. Drawn at the first resolution, square."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"data.prior.count is {self.count}; it must be 0 (draw none) or more")
        if self.path and self.count:
            raise ValueError("data.prior has both a path and a count to draw; give one of them")
        if self.count and not self.prompt.strip():
            raise ValueError("data.prior.prompt is empty; say what the base draws, as in 'a photo of a dog'")
        if self.prompt and not (self.path or self.count):
            raise ValueError("data.prior has a prompt, but no pictures; give data.prior.path, or data.prior.count")
        for name in ("weight", "ratio"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"data.prior.{name} is {getattr(self, name)}; it must be above 0")
        if self.steps < 1:
            raise ValueError(f"data.prior.steps is {self.steps}; it must be 1 or more")


@dataclass
class Data:
    """The training set."""

    path: str = ""
    """A folder of pictures, a .parquet or .arrow file, or the name of a data set on the Hub; or data.sources."""
    resolution: Any = 512
    """Pixels a side of the square that a picture has as many pixels as; a list trains at each in turn."""
    batch_size: int = 1
    """Samples a step on each rank."""
    trigger: str | None = None
    """Put before every caption that does not hold it."""
    validation: float = 0.1
    """Share of the pictures held out, at least one; 0 holds out none."""
    image_column: str = "image"
    caption_column: str = "text"
    """Of metadata.jsonl or metadata.csv, the parquet file or the data set; a list of texts is several captions."""
    masks: str | None = None
    """The masks of data.path: a folder of greyscale pictures of the same names, white where the loss counts."""
    sources: list[Source] = field(default_factory=list)
    """Several sources in place of data.path, each with its masks, repeats and weight."""
    prior: Prior = field(default_factory=Prior)
    background: str = "white"
    """What shows through transparent pictures: a name or #rrggbb."""
    most_pixels: int = MOST_PIXELS
    """Pictures with more are refused before they are decoded; decoding takes about 12 bytes a pixel."""
    aspect: float = 2.0
    """Longest side of a bucket over its shortest; what is longer is cropped. 1 trains squares."""
    bucket_step: int = 16
    """Pixels between the sides of buckets, a multiple of 16. Longer steps cut more and fill batches better."""
    upscale: bool = False
    """Enlarge pictures that are smaller than the resolution; else they are trained at their own size."""
    crops: int = 1
    """Crops of each picture, evenly spread over what its bucket leaves: 1 is the middle."""
    flip: bool = False
    """Train mirrored pictures too; not where left and right matter."""
    prefix: str = ""
    suffix: str = ""
    """Put around every caption as they are, spaces included."""
    caption_lines: bool = False
    """Each line of a .txt or .caption file is a caption of its own."""
    tag_orders: int = 1
    """Orders in which a caption's comma-separated tags are trained; 1 leaves them as written."""
    keep_tags: int = 0
    """The first tags, which stay in front."""
    caption_dropout: float = 0.0
    """Share of the samples that are trained with an empty caption."""
    text_length: int | None = None
    """T5 tokens; null takes the checkpoint's own (512 for FLUX.1-dev)."""
    on_error: str = "raise"
    """What a broken picture or a missing caption does: raise stops, skip leaves it out and names it."""
    least: float = 0.5
    """Share of the samples that must be left after skipping; training does not start with less."""
    cache: str = "runs/cache"
    """Where encoded pictures and captions are kept, for every run."""

    def __post_init__(self) -> None:
        listed = isinstance(self.resolution, list | tuple)
        if not self.resolutions or not all(type(r) is int for r in self.resolutions):
            raise ValueError(f"data.resolution is {self.resolution!r}; give a number, or several as [512,768]")
        for r in self.resolutions:
            if r < 16 or r % 16:
                near = max(16, round(r / 16) * 16)
                raise ValueError(f"data.resolution is {self.resolution}; FLUX packs multiples of 16, such as {near}")
        if listed and len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"data.resolution is {self.resolution}; name each once")
        if self.path and self.sources:
            raise ValueError("data.path and data.sources are both given; put the path among the sources")
        if self.masks and not self.path:
            raise ValueError("data.masks belongs to data.path; give each of data.sources its own masks")
        for name, least in (("batch_size", 1), ("crops", 1), ("tag_orders", 1), ("keep_tags", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be {least} or more")
        if self.keep_tags and self.tag_orders == 1:
            raise ValueError(f"data.keep_tags is {self.keep_tags}, but tags stay as written; set data.tag_orders too")
        for name in ("validation", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it is a share, at least 0 and below 1")
        if not 0 <= self.least <= 1:
            raise ValueError(f"data.least is {self.least}; it is a share, from 0 to 1")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"data.text_length is {self.text_length}; it must be 1 or more, or null")
        if not 1 <= self.aspect < float("inf"):
            raise ValueError(f"data.aspect is {self.aspect}; it must be 1 (squares) or more")
        if self.bucket_step < 16 or self.bucket_step % 16 or self.bucket_step > min(self.resolutions):
            raise ValueError(
                f"data.bucket_step is {self.bucket_step}; it must be a multiple of 16 up to the resolution, such as 64"
            )
        if not 1 <= self.most_pixels <= MOST_PIXELS:
            raise ValueError(f"data.most_pixels is {self.most_pixels}; it must be from 1 to Pillow's own {MOST_PIXELS}")
        if self.on_error not in POLICIES:
            raise ValueError(f"data.on_error is {self.on_error!r}; choose one of {', '.join(POLICIES)}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"data.background is {self.background!r}; give a name such as white, or #rrggbb"
            ) from error

    @property
    def resolutions(self) -> list[int]:
        return list(self.resolution) if isinstance(self.resolution, list | tuple) else [self.resolution]


def read_samples(data: Data) -> list[Sample]:
    """Every sample in a fixed order.

    Raises:
        ValueError: the folder or a picture is missing, a caption is missing or empty, or nothing is found.
    """
    if not data.path:
        raise ValueError("data.path is empty; set it to a folder of pictures with captions")
    folder = Path(data.path)
    if folder.is_dir():
        samples = _read_folder(folder, data.caption_column)
    elif folder.suffix == ".parquet" or (data.path.count("/") == 1 and not folder.is_absolute()):
        samples = _read_dataset(data)
    else:
        raise ValueError(f"data.path {data.path!r} does not exist; set it to a folder of pictures with captions")
    for i, sample in enumerate(samples):
        if not sample.caption.strip():
            raise ValueError(f"{sample.name} has an empty caption; write one, or take the picture out")
        if data.trigger and not re.search(rf"(?<!\w){re.escape(data.trigger)}(?!\w)", sample.caption):
            samples[i] = replace(sample, captions=(f"{data.trigger}, {sample.caption}",))
    if len(samples) < 2 and data.validation > 0:
        raise ValueError(f"{data.path} holds {len(samples)} pictures, too few to hold one out; set data.validation=0")
    return samples


def _read_folder(folder: Path, column: str) -> list[Sample]:
    metadata = folder / "metadata.jsonl"
    captions = _read_metadata(metadata, column) if metadata.is_file() else None
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not pictures:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); set data.path to the folder that does")
    samples = []
    for picture in pictures:
        name = picture.relative_to(folder).as_posix()
        if captions is None:
            sidecar = picture.with_suffix(".txt")
            if not sidecar.is_file():
                raise ValueError(
                    f"{picture} has no caption: write {sidecar.name} beside it, or a metadata.jsonl for all"
                )
            caption = _text(sidecar)
        elif name in captions:
            caption = captions.pop(name)
        else:
            raise ValueError(f'{picture} has no line in {metadata}; add one with "file_name": {json.dumps(name)}')
        samples.append(Sample(str(picture), (caption.strip(),), 0, picture.read_bytes))
    if captions:
        raise ValueError(
            f"{metadata} names {next(iter(captions))!r}, which is not in {folder}; add it or take the line out"
        )
    return samples


def _read_metadata(file: Path, column: str) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(file).split("\n"), start=1):  # splitlines would split within captions
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], entry[column]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} line {number} is not an object with file_name and {column} ({error!r}); "
                f'write {{"file_name": "a.png", "{column}": "a caption"}}, or set data.caption_column'
            ) from error
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{file} line {number}: file_name and {column} must be text")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{file} line {number} names {name!r}, outside its folder; name pictures within it")
        if Path(name).as_posix() in captions:
            raise ValueError(f"{file} line {number} names {name!r} a second time; keep one line a picture")
        captions[Path(name).as_posix()] = caption
    return captions


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error


def _read_dataset(data: Data) -> list[Sample]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.path {data.path!r} is read by `datasets`, which is not installed here: pip install datasets"
        ) from error
    try:
        if data.path.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files=data.path, split="train")
        else:
            table = datasets.load_dataset(data.path, split="train")
    except Exception as error:  # datasets raises many kinds, for absent names, broken files and no network alike
        raise ValueError(
            f"data.path {data.path!r} is no folder here, and datasets cannot load it: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; "
            "check the spelling, or download it and give the local folder"
        ) from error
    for column in (data.image_column, data.caption_column):
        if column not in table.column_names:
            raise ValueError(
                f"{data.path} has no column {column!r}, only {', '.join(table.column_names)}; "
                "set data.image_column and data.caption_column"
            )

    try:
        pictures = table.cast_column(data.image_column, datasets.Image(decode=False))  # plain bytes and paths too
    except Exception as error:  # Arrow has a kind of its own for each type
        raise ValueError(
            f"column {data.image_column!r} of {data.path} holds no pictures ({error}); set data.image_column"
        ) from error

    def read(index: int) -> bytes:
        stored = pictures[index][data.image_column]
        try:
            content: bytes = stored["bytes"] or Path(stored["path"]).read_bytes()
        except OSError as error:
            raise ValueError(f"{data.path}[{index}] cannot be read as a picture ({error})") from error
        return content

    samples = []
    for i, caption in enumerate(table[data.caption_column]):
        if not isinstance(caption, str):
            raise ValueError(
                f"{data.path}[{i}] has {caption!r} as {data.caption_column}, not text; "
                "mend it, or set data.caption_column"
            )
        samples.append(Sample(f"{data.path}[{i}]", (caption.strip(),), 0, partial(read, i)))
    return samples


def read_picture(file: Path) -> Image.Image:
    return decode(file.read_bytes(), str(file))


def to_square(picture: Image.Image, resolution: int) -> Tensor:
    """Scale and crop to the centre square: [3, resolution, resolution] in [-1, 1]."""
    square = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def split(keys: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for validation. Depends on each sample's key and the seed, not on the order."""
    if share == 0:
        return list(range(len(keys))), []
    order = sorted(range(len(keys)), key=lambda i: (hashlib.sha256(f"{seed}/{keys[i]}".encode()).digest(), i))
    count = min(max(1, round(share * len(keys))), len(keys) - 1)
    held = set(order[:count])
    return [i for i in range(len(keys)) if i not in held], sorted(held)
