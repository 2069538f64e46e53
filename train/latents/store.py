"""Encoded samples, read from the cache's shards: pictures by view, masks, texts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO

from torch import Tensor

from infer.family.family import LatentMap, Text
from train.data.batches import Form
from train.data.buckets import reference_view, views_of
from train.data.dataset import Data
from train.data.source import Skipped
from train.data.view import View
from train.latents.identities import Picture
from train.latents.keys import Keys
from train.latents.shards import DamagedError, Item, ShardIndex, read_item


@dataclass
class Cache:
    """Encoded samples on disk. What it uses is not pruned until it is closed or the process ends."""

    data: Data
    keys: Keys
    latent_map: LatentMap
    """Of the autoencoder's latents."""
    sampled: bool
    """Whether the posterior's deviation is stored beside its mean."""
    has_pooled: bool
    """Whether texts have a pooled embedding."""
    held: IO[bytes]
    kept: list[int] = field(default_factory=list)
    """Which of the samples that build was given can be used; all else here counts these, from 0."""
    pictures: list[Picture] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """Those that cannot, under data.on_error=skip."""
    truncated: list[str] = field(default_factory=list)
    """Texts whose end the text encoder does not see."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was there and what was encoded, over all ranks: distinct views, their masks, texts."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of this rank: to read and encode pictures, to load the autoencoder meanwhile, to check stored shards, to encode
    texts."""
    indexes: dict[str, ShardIndex] = field(default_factory=dict)
    """Of the pictures, the masks and the texts."""
    texts: list[str] = field(default_factory=list)
    """All that it was built for, each once."""

    def __post_init__(self) -> None:
        # pictures come in few sizes, and what is not remembered is worked out again
        self.views_of = lru_cache(maxsize=4096)(partial(views_of, data=self.data))

    @property
    def folder(self) -> Path:
        return Path(self.data.cache)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of a with-block to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def identity(self, index: int) -> str:
        """A hash of the sample's decoded pixels."""
        return self.pictures[index].identity

    def mask_identity(self, index: int) -> str | None:
        """A hash of its mask's pixels, if it has one."""
        return self.pictures[index].mask

    def views(self, index: int) -> list[list[View]]:
        """The sample's views: one list a resolution, of what may be drawn at it."""
        return self.views_of(self.pictures[index].width, self.pictures[index].height)

    def picture(self, index: int, view: View) -> tuple[Tensor, Tensor | None]:
        """A view's latents: mean and deviation of the autoencoder's posterior, [channels, height / 8, width / 8] each,
        in fp32, normalised as the transformer expects them; no deviation where a family is trained on the mode."""
        names = ("mean", "deviation") if self.sampled else ("mean",)
        item = self._read("pictures", self.keys.picture(self.identity(index), view), *names)
        mean = self.latent_map.normalise(item["mean"])
        return mean, self.latent_map.deviation(item["deviation"]) if self.sampled else None

    def forms(self, index: int) -> list[Form]:
        """The sizes of the sample's picture and of its references at each resolution."""
        return [
            tuple((one.height, one.width) for one in (views[0], *self.reference_views(index, views[0], i)))
            for i, views in enumerate(self.views(index))
        ]

    def reference_views(self, index: int, view: View, resolution: int) -> list[View]:
        """The views of its references that go with a view at a resolution, by its index."""
        return self._reference_views(self.pictures[index], view, resolution)

    def _reference_views(self, picture: Picture, view: View, resolution: int) -> list[View]:
        size, side = (picture.width, picture.height), self.data.resolutions[resolution]
        return [reference_view((one.width, one.height), size, view, side, self.data) for one in picture.references]

    def references(self, index: int, view: View, resolution: int) -> list[Tensor]:
        """The latents of its references that go with a view, [channels, height / 8, width / 8] each, in fp32,
        normalised: the posterior's mean, as the pipelines take it in every family."""
        views = self.reference_views(index, view, resolution)
        keys = (
            self.keys.picture(one.identity, own)
            for one, own in zip(self.pictures[index].references, views, strict=True)
        )
        return [self.latent_map.normalise(self._read("pictures", key, "mean")["mean"]) for key in keys]

    def mask(self, index: int, view: View) -> Tensor | None:
        """A view's mask at latent size, [height / 8, width / 8] in [0, 1]; None if the sample has none."""
        identity = self.mask_identity(index)
        return None if identity is None else self._read("masks", self.keys.mask(identity, view), "mask")["mask"]

    def text(self, text: str) -> Text:
        """A text's embeddings, in the dtype that the encoders give."""
        names = ("embeds", "pooled") if self.has_pooled else ("embeds",)
        item = self._read("texts", self.keys.text(text), *names)
        return Text(item["embeds"], item.get("pooled"))

    def _read(self, kind: str, key: str, *parts: str) -> Item:
        file = self.indexes[kind].find(key)
        assert file is not None, key
        try:
            return read_item(file, key, *parts)
        except DamagedError as damage:
            if file.exists():
                self.indexes[kind].distrust(damage)
            raise ValueError(f"{damage}; start again: what it held is then encoded anew") from damage

    def reference_keys(self, picture: Picture, number: int) -> dict[str, View]:
        """The keys of all views of one of a picture's references, and the views.

        Raises:
            ValueError: the reference is too small for a bucket; the message follows its name.
        """
        identity = picture.references[number].identity
        return {
            self.keys.picture(identity, own): own
            for resolution, views in enumerate(self.views_of(picture.width, picture.height))
            for view in views
            for own in [self._reference_views(picture, view, resolution)[number]]
        }

    def all_keys_of(self, kind: str, picture: Picture) -> set[str]:
        """The keys of a picture's views and of its references' ("pictures"), or of its mask's ("masks")."""
        found = set(self.keys_of(kind, picture))
        for number in range(len(picture.references) if kind == "pictures" else 0):
            found |= self.reference_keys(picture, number).keys()
        return found

    def keys_of(self, kind: str, picture: Picture) -> dict[str, View]:
        """The keys of all views of a picture ("pictures"), or of its mask ("masks"), and the views.

        Raises:
            ValueError: the picture is too small for a bucket; the message follows its name.
        """
        identity, key = (picture.identity, self.keys.picture) if kind == "pictures" else (picture.mask, self.keys.mask)
        if identity is None:
            return {}
        return {key(identity, view): view for views in self.views_of(picture.width, picture.height) for view in views}

    def all_keys(self, kind: str) -> set[str]:
        """The keys of all that the cache was built for: of its pictures, masks or texts."""
        if kind == "texts":
            return {self.keys.text(text) for text in self.texts}
        return {key for picture in set(self.pictures) for key in self.all_keys_of(kind, picture)}

    def absent(self, picture: Picture | Skipped) -> bool:
        """Whether a view of a picture, or of its mask, is not on disk yet."""
        if isinstance(picture, Skipped):
            return False
        return any(self.indexes[kind].absent(self.all_keys_of(kind, picture)) for kind in ("pictures", "masks"))

    def close(self) -> None:
        """Let others prune."""
        self.held.close()
