"""Remove from the cache what the given settings do not use: encodings, unpacked tables, drawn class pictures.

What goes is named first. What another run has used (train/latents/users.py) goes only if that is said (`force`).
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from infer.checkpoint.model import Model
from infer.quantize.precision import Precision
from train.data.dataset import Data, sources_of
from train.data.hf_table import is_table, unpacked
from train.latents.identities import prune_identities
from train.latents.locks import hold
from train.latents.prior import prior_folder
from train.latents.shards import DamagedError, list_shards, prune, read_keys
from train.latents.store import Cache
from train.latents.users import DIGITS, forget_gone, uses

WHAT = {"pictures": "views of pictures", "masks": "views of masks", "texts": "texts"}


def folders_used(data: Data, model: Model, precision: Precision) -> set[Path]:
    """The folders of the cache that hold unpacked tables and drawn class pictures of these settings."""
    given = sources_of(data)[:-1] if data.prior.count else sources_of(data)
    tables = {unpacked(source, Path(data.cache)) for source in given if is_table(source.path)}
    drawn = {prior_folder(data, model, precision)} if data.prior.count else set()
    return {folder for folder in tables if folder is not None} | drawn


@dataclass
class Surplus:
    """What a cache holds beyond what some settings use."""

    keys: dict[str, set[str]]
    """Of encodings, by kind."""
    folders: list[Path]
    """Of unpacked tables and drawn class pictures."""
    users: list[str]
    """Runs that have used some of it, with how much."""

    def __str__(self) -> str:
        parts = [f"{len(keys):,} {WHAT[kind]}" for kind, keys in self.keys.items() if keys]
        return ", ".join([*parts, *map(str, self.folders)]) or "nothing"


def find_surplus(cache: Cache, folders: Collection[Path]) -> Surplus:
    """What is there and not used by this cache's settings, and which runs have used it."""
    keys = {}
    for kind, index in cache.indexes.items():
        there: set[str] = set()
        for file in list_shards(index.folder):
            try:
                there |= read_keys(file)
            except DamagedError:  # prune sees to it
                continue
        keys[kind] = there - cache.all_keys(kind)
    root = cache.folder
    gone = [
        folder for kind in ("tables", "prior") for folder in sorted((root / kind).glob("*/")) if folder not in folders
    ]
    cut = {key[:DIGITS] for every in keys.values() for key in every}
    users = []
    for run, used, within in uses(root):
        count = len(used & cut) + len(within.intersection(gone))
        if count:
            users.append(f"{run} ({count:,} of them)")
    return Surplus(keys, gone, users)


def prune_cache(cache: Cache, folders: Collection[Path], force: bool, say: Callable[[str], object]) -> None:
    """Remove all that this cache does not use, but for `folders`; it is closed by that.

    Raises:
        ValueError: another process uses the folder, and may need what would be removed; or without `force`, runs have
            used some of it.
    """
    root = cache.folder
    surplus = find_surplus(cache, folders)
    if surplus.users and not force:
        raise ValueError(
            f"prune=true would remove {surplus} from {root}, which other runs have used: {', '.join(surplus.users)}; "
            "they would encode it again. Add force=true to remove it all the same"
        )
    cache.close()
    with hold(root, alone=True):
        say(f"removed from {root}: {surplus}")
        for index in cache.indexes.values():
            prune(index.folder, cache.all_keys(index.folder.name))
        pixels = {name for picture in cache.pictures for name in (picture.identity, picture.mask) if name}
        pixels |= {shown.identity for picture in cache.pictures for shown in picture.references}
        prune_identities(root / "index", pixels, index.warn)
        for folder in surplus.folders:
            shutil.rmtree(folder)
        forget_gone(root)
