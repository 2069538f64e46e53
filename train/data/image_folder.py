"""A folder of pictures with captions -> samples.

Captions come from metadata.jsonl or metadata.csv (a `file_name` and a text a line, as datasets' imagefolder reads them,
in any subfolder for what is below it) or from a .txt or .caption file beside each picture. Where the two differ,
neither is chosen. A name means the file of the same letters, however Unicode composes them and its ending is
capitalised. Nothing outside of the folder is read: not by `../`, nor by an absolute name, nor by a link, but those of
the Hub's cache. Files and folders whose names begin with a dot are no part of it.
"""

import errno
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from infer.program.paths import roots_of
from infer.sample.picture import HEIC, NO_HEIC, SUFFIXES, reads_heic
from train.data.metadata import METADATA, Listed, list_for, lists_in, read_metadata, read_text
from train.data.names import Names, key_of, stem_of
from train.data.no_source import no_caption
from train.data.source import Faults, Reference, Sample, Source, clean

SIDECARS = (".txt", ".caption")
# pictures that are not read: a folder that holds them should not lose them without a word
UNREAD = (
    ".jxl",
    ".svg",
    ".psd",
    ".xcf",
    ".exr",
    ".hdr",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
)


def read_folder(source: Source, index: int, column: str, lines: bool, faults: Faults) -> list[Sample]:
    """The samples of a source that is a folder, in the order of their names.

    index: of the source. column: of the captions in the metadata. lines: each line of a sidecar is a caption.

    Raises:
        ValueError: it holds no pictures, its metadata cannot be read, or its masks' folder is not there.
    """
    for option, value in (("image_column", source.image_column), ("subset", source.subset)):
        if value is not None:
            raise ValueError(f"{option} of {source.path} is {value!r}, but that is a folder of pictures; leave it out")
    if source.split != "train":
        raise ValueError(f"split of {source.path} is {source.split!r}, but that is a folder of pictures; leave it out")
    folder = Path(source.path)
    masks = None if source.masks is None else Path(source.masks)
    if masks is not None and not masks.is_dir():
        raise ValueError(f"masks {source.masks!r} of {folder} is no folder; set it to the one that holds the masks")
    given = [Path(path) for path in source.references]
    for path in given:
        if not path.is_dir():
            raise ValueError(f"references {str(path)!r} of {folder} is no folder; set it to the one that holds them")
        if path.resolve() == folder.resolve():
            raise ValueError(f"references {str(path)!r} of {folder} is that folder itself; name the one of the befores")
    files = _list(folder, [*([] if masks is None else [masks]), *given], faults)
    every = [name for name in files if _suffix(name) in SUFFIXES]
    if not every:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); set its path to the folder that does")
    names = Names(every)
    listed: dict[str, Listed] = {}
    lists = lists_in(folder, files)
    for name in lists.values():
        read_metadata(folder, name, column, names, listed, faults)
    # what the metadata names as a reference is a sample only if it has a line of its own
    shown = {names.find(each) or each for line in listed.values() for each in line.references} - listed.keys()
    pictures = [name for name in every if name not in shown]
    mask_of = {} if masks is None else _pair(pictures, masks, "mask", faults)
    references_of = [_pair(pictures, path, "reference", faults) for path in given]
    sidecars = Names(name for name in files if _suffix(name) in SIDECARS)

    samples = []
    for name in pictures:
        try:
            found, missing = _captions(folder, name, listed.get(name), list_for(name, lists), sidecars, lines)
            captions = clean(found, source.caption, missing)
            if masks is not None and name not in mask_of:
                raise ValueError(f"has no mask in {masks}; put one there under the same name, white where all counts")
            line = listed.get(name)
            references = _references(folder, name, () if line is None else line.references, names, given, references_of)
        except ValueError as error:
            faults.add(str(folder / name), str(error))
            continue
        file, mask = folder / name, None if masks is None else masks / mask_of[name]
        read_mask = None if mask is None else partial(read_bytes, str(mask))
        read = partial(read_bytes, str(file))
        samples.append(Sample(str(file), captions, index, read, read_mask, file, mask, references))
    for name, line in listed.items():
        if name not in names:
            near = names.near(name)
            mend = f"did you mean {near!r}?" if near else "add it or take the line out"
            faults.add(str(folder / line.file), f"names {name!r}, which is not in {folder}; {mend}")
    return samples


def _references(
    folder: Path, name: str, said: tuple[str, ...], names: Names, given: list[Path], of: list[dict[str, str]]
) -> tuple[Reference, ...]:
    """A picture's references: those that its line in the metadata names, or one of each folder that is given.

    names: of all pictures in the folder. of: by given folder, the references' names by those of their pictures.

    Raises:
        ValueError: one is not there, or both ways are taken.
    """
    if said and given:
        raise ValueError(
            f"has references in its folder's metadata, and {given[0]} is given too; keep one of the two ways"
        )
    files = []
    for each in said:
        found = names.find(each)
        if found is None:
            near = names.near(each)
            mend = f"did you mean {near!r}?" if near else "add it or mend the line"
            raise ValueError(f"has the reference {each!r}, which is not in {folder}; {mend}")
        files.append(folder / found)
    for path, pairs in zip(given, of, strict=True):
        if name not in pairs:
            raise ValueError(
                f"has no reference in {path}; put one there under the same name, or the picture into a source of its "
                "own without references"
            )
        files.append(path / pairs[name])
    return tuple(Reference(str(file), partial(read_bytes, str(file)), file) for file in files)


def _captions(
    folder: Path, name: str, line: Listed | None, metadata: str | None, sidecars: Names, lines: bool
) -> tuple[list[str] | None, str]:
    """A picture's captions, if there are any, and what there would have to be.

    Raises:
        ValueError: a file beside it cannot be read, or says something else than the metadata.
    """
    beside = _sidecars_of(name, sidecars)
    if line is None and metadata is None:
        text = PurePosixPath(name).with_suffix(".txt").name
        missing = f"no caption: write {text} beside it, or a metadata.jsonl for all{no_caption(folder, name)}"
        return _read_sidecars(folder, beside, lines) or None, missing
    if line is None:
        assert metadata is not None
        if beside:
            raise ValueError(
                f"has no line in {folder / metadata}, but a caption in {folder / beside[0]}; add the line, or take one "
                "of the two files out"
            )
        relative = PurePosixPath(name).relative_to(PurePosixPath(metadata).parent)
        return None, f'no line in {folder / metadata}; add one with "file_name": {json.dumps(str(relative))}'
    said = {caption.strip() for caption in line.captions}
    for each in beside:
        texts = _read_sidecars(folder, [each], lines)
        if any(text.strip() and text.strip() not in said for text in texts):
            raise ValueError(
                f"has one caption in {folder / line.file} and another in {folder / each}; keep one of them, or make "
                "them the same"
            )
    return line.captions, ""


def _sidecars_of(name: str, sidecars: Names) -> list[str]:
    """The caption files beside a picture, at most one of each kind.

    Raises:
        ValueError: there are several of a kind, none of which has the picture's very name.
    """
    stem, found = str(PurePosixPath(name).with_suffix("")), []
    there = sidecars.by_stem.get(stem_of(name), [])
    for kind in SIDECARS:
        alike = [each for each in there if _suffix(each) == kind]
        exact = [each for each in alike if str(PurePosixPath(each).with_suffix("")) == stem]
        chosen = exact or alike
        if len(chosen) > 1:
            raise ValueError(f"could have its caption from any of {', '.join(map(repr, chosen))}; keep one of them")
        found += chosen
    return found


def read_bytes(file: str) -> bytes:
    """A file's content.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); mend that, or take it out") from error


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _list(folder: Path, aside: Collection[Path], faults: Faults) -> dict[str, None]:
    """The files below a folder that may be read, by their names in it, in order; without those below any of `aside`."""
    roots = roots_of(folder)
    found = []
    for name, entry in _walk(folder, "", {each.resolve() for each in aside}):
        readable = _suffix(name) in (*SUFFIXES, *SIDECARS) or entry.name.lower() in METADATA
        if not readable and _suffix(name) not in UNREAD and not entry.is_dir():
            continue
        if entry.is_symlink() and _loops(entry):
            faults.add(entry.path, "is a link to itself; take it out")
        elif entry.is_symlink() and not any(Path(entry.path).resolve().is_relative_to(root) for root in roots):
            faults.add(entry.path, f"is a link out of {folder}; put the file itself there, or take the link out")
        elif entry.is_dir():
            faults.add(entry.path, "is a link to a folder; give that folder as a source of its own, or take it out")
        elif not entry.is_file():
            faults.add(entry.path, "is no file; take it out")
        elif not readable:
            faults.add(entry.path, f"is of a format that is not read; save it as one of {', '.join(SUFFIXES)}")
        elif _suffix(name) in HEIC and not reads_heic():
            faults.add(entry.path, NO_HEIC)
        else:
            found.append(name)
    return dict.fromkeys(sorted(found, key=lambda name: name.split("/")))


def _loops(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to itself."""
    try:
        entry.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _walk(folder: Path, within: str, aside: Collection[Path]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry below a folder that is no folder itself, with its name in the first one; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield within + entry.name, entry
            elif not aside or Path(entry.path).resolve() not in aside:
                yield from _walk(Path(entry.path), f"{within}{entry.name}/", aside)


def _pair(pictures: list[str], masks: Path, what: str, faults: Faults) -> dict[str, str]:
    """Each picture's mask or reference (`what`): the file of the same name, or else of the same name but for its
    ending, where that is meant for no other picture."""
    there = [name for name in _list(masks, (), faults) if _suffix(name) in SUFFIXES]
    pairs = {name: name for name in set(there) & set(pictures)}
    left = set(there) - set(pictures)
    spellings: tuple[Callable[[str], str], ...] = (key_of, stem_of)
    for spelled in spellings:
        masks_by = defaultdict(list)
        for name in sorted(left):
            masks_by[spelled(name)].append(name)
        counts = Counter(map(spelled, pictures))
        for name in pictures:
            found = masks_by[spelled(name)]
            if name not in pairs and counts[spelled(name)] == 1 and len(found) == 1:
                pairs[name] = found[0]
                left.discard(found[0])
    for name in sorted(left):
        faults.add(
            str(masks / name), f"is the {what} of no picture, or of more than one; give it its picture's full name"
        )
    return pairs


def _read_sidecars(folder: Path, beside: list[str], lines: bool) -> list[str]:
    captions = []
    for name in beside:
        try:
            text = read_text(folder / name)
        except ValueError as error:
            raise ValueError(f"has a broken caption: {error}") from error
        # splitlines would split within captions, at any of Unicode's separators
        captions += [line for line in text.split("\n") if line.strip()] if lines else [text]
    return captions
