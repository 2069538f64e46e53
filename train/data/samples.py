"""The training set -> its samples: every source is read, and what is left is enough to train on."""

from dataclasses import replace
from pathlib import Path

from infer.program.no_effect import refuse_idle
from train.data.cloud import is_cloud, local_copy
from train.data.dataset import Data, sources_of
from train.data.hf_table import is_table, read_table
from train.data.image_folder import SIDECARS, read_folder
from train.data.metadata import METADATA
from train.data.no_source import no_source
from train.data.references import refuse_without_references
from train.data.source import Faults, Sample, Skipped, Source


def read_samples(data: Data) -> tuple[list[Sample], list[Skipped]]:
    """Every sample in a fixed order, and under data.on_error=skip what is left out; pictures are not decoded yet.

    Pictures that the base draws for prior preservation are not among them: see train/latents/prior.py.

    Raises:
        ValueError: a source cannot be read at all; or, under data.on_error=raise, anything is wrong with a sample.
    """
    if not data.path and not data.sources:
        raise ValueError("data.path is empty; set it to a folder of pictures with captions")
    faults = Faults(data.on_error)
    samples = []
    sources = [_here(source, data) for source in sources_of(data)]
    _refuse_idle(data, [source.path for source in sources if not source.prior])
    for index, source in enumerate(sources[:-1] if data.prior.count else sources):
        column = source.caption_column or data.caption_column
        if is_table(source.path):
            image_column = source.image_column or data.image_column
            samples += read_table(source, index, image_column, column, Path(data.cache), faults)
        elif Path(source.path).is_dir():
            samples += read_folder(source, index, column, data.caption_lines, faults)
        else:
            what = "data.path" if sources_of(data)[index].path == data.path else "a source's path"
            raise ValueError(f"{what} {no_source(source.path)}")
    refuse_without_references(data, samples)
    return samples, faults.skipped


def _here(source: Source, data: Data) -> Source:
    """A source with local copies of what it names in the cloud."""
    cache = Path(data.cache)
    if is_cloud(source.path):
        option = "data.path" if source.path == data.path else "a source's path"
        source = replace(source, path=str(local_copy(source.path, cache, option)))
    if source.masks is not None and is_cloud(source.masks):
        option = "data.masks" if source.masks == data.masks else "a source's masks"
        source = replace(source, masks=str(local_copy(source.masks, cache, option)))
    if any(map(is_cloud, source.references)):
        option = "data.references" if source.references == data.references else "a source's references"
        here = [str(local_copy(each, cache, option)) if is_cloud(each) else each for each in source.references]
        source = replace(source, references=here)
    return source


def _refuse_idle(data: Data, paths: list[str]) -> None:
    """Refuse what is set for tables where all sources are folders, and the other way round."""
    tables = [path for path in paths if is_table(path)]
    folders = [path for path in paths if path not in tables]
    listed = [path for path in folders if any(next(Path(path).rglob(name), None) for name in METADATA)]
    if not tables:
        refuse_idle(data, "data.", ("image_column",), "no source is a table; pictures of a folder are files")
    if not tables and not listed:
        reason = "no source is a table or has a metadata file; captions are in .txt or .caption files"
        refuse_idle(data, "data.", ("caption_column",), reason)
    if not any(next(Path(path).rglob(f"*{end}"), None) for path in folders for end in SIDECARS):
        reason = "it splits .txt and .caption files, and no source has one"
        refuse_idle(data, "data.", ("caption_lines",), reason)


def check_left(data: Data, samples: list[Sample], skipped: list[Skipped]) -> None:
    """See that enough is left to train on.

    Raises:
        ValueError: less than data.least, nothing at all, or too few to hold one out.
    """
    sources = sources_of(data)
    kept = sum(not sources[sample.source].prior for sample in samples)
    said = f"; the first: {skipped[0].name} {skipped[0].reason}" if skipped else ""
    if kept == 0:
        raise ValueError(f"nothing is left to train on ({len(skipped)} skipped{said}); mend the pictures or captions")
    if len(samples) < data.least * (len(samples) + len(skipped)):
        raise ValueError(
            f"{len(skipped)} of {len(samples) + len(skipped)} samples are skipped, and data.least={data.least} of them "
            f"must be left; mend them, or lower data.least{said}"
        )
    if kept < 2 and data.validation > 0:
        raise ValueError(f"there are {kept} pictures, too few to hold one out; set data.validation=0")
