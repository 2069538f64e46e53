"""A data set that `datasets` reads -> samples: a parquet or arrow file, a folder of them, or a data set on the Hub."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from infer.program.absent import meant
from infer.program.paths import is_hub_id, roots_of
from infer.program.remembered import Remembered
from infer.sample.picture import SUFFIXES
from train.data.source import Faults, Reference, Sample, Source, clean

KINDS = {".parquet": "parquet", ".arrow": "arrow"}


def is_table(name: str) -> bool:
    """Whether a source's path is for `datasets`: a file or a folder of its kinds, or a name such as owner/name."""
    path = Path(name)
    if path.is_dir():
        return _saved(path) or any(_kind(file) == "table" for file in _walk(path))
    return path.suffix.lower() in KINDS or is_hub_id(name)


def unpacked(source: Source, cache: Path) -> Path | None:
    """Where what `datasets` unpacks of a source goes; None if that is no local table.

    By content: datasets itself takes a file of the same name and time for the same.
    """
    path = Path(source.path)
    if not path.exists() or _saved(path):
        return None
    digest, remembered = hashlib.sha256(repr(source.subset).encode()), Remembered(cache)
    for file in _tables(path):
        digest.update(f"/{file.relative_to(path)}/".encode())
        digest.update(remembered.sha256(file))
    remembered.save()
    return cache / "tables" / digest.hexdigest()[:32]


def read_table(
    source: Source, index: int, image_column: str, caption_column: str, cache: Path, faults: Faults
) -> list[Sample]:
    """The samples of a source that is a data set, in its order.

    index: of the source. cache: what `datasets` unpacks of local files goes below it.

    Raises:
        ValueError: it cannot be loaded, or a column is not there.
    """
    if source.masks is not None:
        raise ValueError(f"masks of {source.path} is {source.masks!r}; only the pictures of a folder can have masks")
    table, roots = _load(source, cache)
    for column in (image_column, caption_column, *source.references):
        if column not in table.column_names and not (column == caption_column and source.caption):
            raise ValueError(
                f"{source.path} has no column {column!r}, only {', '.join(table.column_names)}; "
                "set data.image_column, data.caption_column and data.references"
            )
    import datasets

    columns = [image_column, *source.references]
    pictures = table.select_columns(columns)
    for column in columns:
        setting = "data.image_column" if column == image_column else "data.references"
        try:  # as bytes or paths: whatever the column holds
            pictures = pictures.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # Arrow has a kind of its own for each type
            raise ValueError(
                f"column {column!r} of {source.path} holds no pictures ({error}); set {setting}"
            ) from error

    def read(row: int, column: str) -> bytes:
        name = f"{source.path}[{row}]{'' if column == image_column else f' ({column})'}"
        stored = pictures[row][column] or {}
        content: bytes = stored.get("bytes") or b""
        if content:
            return content
        if not stored.get("path"):
            raise ValueError(f"{name} cannot be read as a picture (there is none); take it out")
        try:
            file = (roots[0] / stored["path"]).resolve()
            if not any(file.is_relative_to(allowed) for root in roots for allowed in roots_of(root)):
                raise ValueError(f"{name} names {stored['path']!r}, outside its folder; put the bytes in the table")
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{name} cannot be read as a picture ({error}); mend that, or take it out") from error
        return content

    # null is a sample without this reference
    stored = pictures.with_format("arrow")[:]  # mapped, not read
    there = {column: stored.column(column).is_valid().to_pylist() for column in source.references}
    captions = table[caption_column][:] if caption_column in table.column_names else [None] * len(table)
    samples = []
    for row, found in enumerate(captions):
        name = f"{source.path}[{row}]"
        texts = found if isinstance(found, list) else [found]
        missing = found is None and source.caption is not None
        if not missing and not all(isinstance(text, str) for text in texts):
            faults.add(name, f"has {found!r} as {caption_column}, not text; mend it, or set data.caption_column")
            continue
        try:
            kept = clean(None if missing else texts, source.caption, "no caption; write one, or take the picture out")
        except ValueError as error:
            faults.add(name, str(error))
        else:
            references = tuple(
                Reference(f"{name} ({column})", partial(read, row, column), None)
                for column in source.references
                if there[column][row]
            )
            samples.append(Sample(name, kept, index, partial(read, row, image_column), references=references))
    return samples


def _saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder; what begins with a dot is no part of it."""
    for within, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(within, name) for name in sorted(names) if not name.startswith("."))


def _kind(file: Path) -> str:
    return "picture" if file.suffix.lower() in SUFFIXES else "table" if file.suffix.lower() in KINDS else ""


def _tables(path: Path) -> list[Path]:
    """The files of a local table."""
    return [path] if path.is_file() else [file for file in _walk(path) if _kind(file) == "table"]


def _load(source: Source, cache: Path) -> tuple[Any, list[Path]]:
    """The table, and the folders that its pictures may be in where it holds paths; relative ones are in the first."""
    path = Path(source.path)
    if path.suffix in KINDS and not path.exists():
        mend = meant(source.path, f"give a {path.suffix} file that does, or a folder of pictures")
        raise ValueError(f"{source.path!r} does not exist; {mend}")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source.path!r} is read by `datasets`, which is not installed here: pip install datasets"
        ) from error
    saved = path.is_dir() and _saved(path)
    if path.is_dir() and not saved:
        tables = _tables(path)
        if any(_kind(file) == "picture" for file in _walk(path)):
            raise ValueError(f"{path} holds pictures beside tables ({tables[0]}); put them in folders of their own")
        if len({file.suffix.lower() for file in tables}) > 1:
            raise ValueError(f"{path} holds both parquet and arrow files; put them in folders of their own")
    if source.subset is not None and (saved or path.is_file()):
        raise ValueError(f"subset of {source.path} is {source.subset!r}, but that has none; leave it out")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is broken we say ourselves
    try:
        if saved:
            loaded = datasets.load_from_disk(source.path)
            if isinstance(loaded, datasets.DatasetDict):
                return loaded[source.split], [path]
            if source.split != "train":
                raise ValueError(f"it has no splits, but split is {source.split!r}; leave that out")
            return loaded, [path]
        if path.exists():
            given: dict[str, Any] = {"split": source.split, "cache_dir": str(unpacked(source, cache))}
            if path.is_file():
                return datasets.load_dataset(KINDS[path.suffix.lower()], data_files=[str(path)], **given), [path.parent]
            # as a data set's own folder: splits by the names of its files, subsets by its README
            return datasets.load_dataset(str(path), source.subset, **given), [path]
        table = datasets.load_dataset(source.path, source.subset, split=source.split)
        return table, [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_CACHE_HOME)]
    except Exception as error:  # datasets raises many kinds, for absent names, broken files and no network alike
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
        raise ValueError(
            f"{source.path!r} is no folder of pictures here, and datasets cannot load it: {reason}; check the "
            "spelling, or download it and give the local folder"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
