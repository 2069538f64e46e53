"""Remove from the cache what the given settings do not use: encodings, unpacked tables, drawn class pictures."""

import shutil
from collections.abc import Collection
from pathlib import Path

from infer.checkpoint.load import Model
from infer.quantize.precision import Precision
from train.data.dataset import Data, sources_of
from train.data.hf_table import is_table, unpacked
from train.latents.identities import prune_identities
from train.latents.locks import hold
from train.latents.prior import prior_folder
from train.latents.shards import prune
from train.latents.store import Cache


def folders_used(data: Data, model: Model, precision: Precision) -> set[Path]:
    """The folders of the cache that hold unpacked tables and drawn class pictures of these settings."""
    given = sources_of(data)[:-1] if data.prior.count else sources_of(data)
    tables = {unpacked(source, Path(data.cache)) for source in given if is_table(source.path)}
    drawn = {prior_folder(data, model, precision)} if data.prior.count else set()
    return {folder for folder in tables if folder is not None} | drawn


def prune_cache(cache: Cache, folders: Collection[Path]) -> None:
    """Remove all that this cache does not use, but for `folders`; it is closed by that.

    Raises:
        ValueError: another process uses the folder, and may need what would be removed.
    """
    root = cache.folder
    cache.close()
    with hold(root, alone=True):
        for index in cache.indexes.values():
            prune(index.folder, cache.all_keys(index.folder.name))
        pixels = {name for picture in cache.pictures for name in (picture.identity, picture.mask) if name}
        prune_identities(root / "index", pixels, index.warn)
        for kind in ("tables", "prior"):
            for folder in (root / kind).glob("*/"):
                if folder not in folders:
                    shutil.rmtree(folder)
