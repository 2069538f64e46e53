"""A folder of pictures with captions -> samples.

Captions come from metadata.jsonl (datasets' imagefolder: `file_name` and `text` a line) or from one .txt file beside
each picture. A Hub data set or a local parquet file is read through `datasets`.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class Data:
    """The training set."""

    path: str = ""
    """A folder of pictures, a .parquet file, or the name of a data set on the Hub."""
    resolution: int = 512
    """Pixels a side: pictures are scaled and cropped to this square, around their centre."""
    batch_size: int = 1
    """Samples a step on each rank."""
    trigger: str | None = None
    """Put before every caption that does not hold it."""
    validation: float = 0.1
    """Share of the pictures held out, at least one; 0 holds out none."""
    image_column: str = "image"
    caption_column: str = "text"
    """Of metadata.jsonl, the parquet file or the data set."""
    text_length: int | None = None
    """T5 tokens; null takes the checkpoint's own (512 for FLUX.1-dev)."""
    cache: str = "runs/cache"
    """Where encoded pictures and captions are kept, for every run."""

    def __post_init__(self) -> None:
        if self.resolution < 16 or self.resolution % 16:
            near = max(16, round(self.resolution / 16) * 16)
            raise ValueError(f"data.resolution is {self.resolution}; FLUX packs multiples of 16, such as {near}")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size is {self.batch_size}; it must be 1 or more")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}; it is a share, at least 0 and below 1")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"data.text_length is {self.text_length}; it must be 1 or more, or null")


@dataclass
class Sample:
    """A picture with its caption. `name` says where it came from, for messages."""

    name: str
    caption: str
    load: Callable[[], Image.Image]


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
    for sample in samples:
        if not sample.caption.strip():
            raise ValueError(f"{sample.name} has an empty caption; write one, or take the picture out")
        if data.trigger and not re.search(rf"(?<!\w){re.escape(data.trigger)}(?!\w)", sample.caption):
            sample.caption = f"{data.trigger}, {sample.caption}"
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
        samples.append(Sample(str(picture), caption.strip(), partial(read_picture, picture)))
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
        pictures = table.cast_column(data.image_column, datasets.Image())  # plain bytes and paths too
    except Exception as error:  # Arrow has a kind of its own for each type
        raise ValueError(
            f"column {data.image_column!r} of {data.path} holds no pictures ({error}); set data.image_column"
        ) from error

    def load(index: int) -> Image.Image:
        with _readable(f"{data.path}[{index}]"):
            return upright(pictures[index][data.image_column])

    samples = []
    for i, caption in enumerate(table[data.caption_column]):
        if not isinstance(caption, str):
            raise ValueError(
                f"{data.path}[{i}] has {caption!r} as {data.caption_column}, not text; "
                "mend it, or set data.caption_column"
            )
        samples.append(Sample(f"{data.path}[{i}]", caption.strip(), partial(load, i)))
    return samples


def read_picture(file: Path) -> Image.Image:
    """A picture upright in RGB, transparency over white.

    Raises:
        ValueError: it cannot be decoded, or has more than Pillow's bound of 179 million pixels.
    """
    with _readable(str(file)), Image.open(file) as picture:
        return upright(picture)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say which picture it is that Pillow refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it warns at half of what it refuses
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large ({error}); scale it down") from error
    except Exception as error:  # each format's decoder raises other kinds on broken files
        raise ValueError(f"{name} cannot be read as a picture ({error}); save it again or take it out") from error


def upright(picture: Image.Image) -> Image.Image:
    """EXIF rotation applied, transparency over white, RGB.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose white is not known.
    """
    turned = ImageOps.exif_transpose(picture)
    if turned.mode in ("I", "F"):
        raise ValueError(f"its mode is {turned.mode}, 32 bits a pixel; 8 or 16 are read")
    if turned.mode.startswith("I;16"):  # convert would clip at 255
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    if turned.has_transparency_data:
        layer = turned.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        ground.alpha_composite(layer)
        turned = ground
    return turned.convert("RGB")


def to_square(picture: Image.Image, resolution: int) -> Tensor:
    """Scale and crop to the centre square: [3, resolution, resolution] in [-1, 1]."""
    square = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def pixel_hash(picture: Image.Image) -> str:
    """A hash of the decoded pixels: the same for a renamed or re-compressed lossless file, another for any edit."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def split(keys: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for validation. Depends on each sample's key and the seed, not on the order."""
    if share == 0:
        return list(range(len(keys))), []
    order = sorted(range(len(keys)), key=lambda i: (hashlib.sha256(f"{seed}/{keys[i]}".encode()).digest(), i))
    count = min(max(1, round(share * len(keys))), len(keys) - 1)
    held = set(order[:count])
    return [i for i in range(len(keys)) if i not in held], sorted(held)
