"""How pictures and texts are encoded into the cache: settings, checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from infer.program.bounds import MANY, PIXELS, check_most
from train.latents.workers import own_cores

if TYPE_CHECKING:
    import torch


@dataclass
class Encode:
    """How pictures and texts are encoded into the cache. Only `tile` changes what comes out: a resumed run may change
    the others."""

    batch_pixels: int | None = field(default=None, metadata={"may_change": True})
    """Pixels that the autoencoder takes at once, at least one picture. Null: 2^20 on a GPU, which is four pictures of
    512x512; one picture on a CPU, where more are no faster."""
    tile: int = 2048
    """Pictures with a longer side are encoded in overlapping tiles of this many pixels a side, which bounds memory and
    changes latents near the seams; 0 never tiles."""
    workers: int | None = field(default=None, metadata={"may_change": True})
    """Threads that read and decode. Null: one a core, the cores shared by the ranks of one machine."""
    decode_pixels: int = field(default=2**26, metadata={"may_change": True})
    """Pixels decoded at the same time by all threads, at 8 to 21 bytes each; a larger picture is decoded alone."""
    shard_mib: int = field(default=64, metadata={"may_change": True})
    """Encodings are written in files of about this size in MiB."""
    flush_seconds: float = field(default=30.0, metadata={"may_change": True})
    """Encodings are written after so many seconds at the latest: what a killed process has to encode again."""
    verify: bool = field(default=True, metadata={"may_change": True})
    """Compare the checksums of all that the run uses before it starts, of each file once and again when it has changed,
    so that what is damaged is encoded again. False leaves that out, and damage stops the run when it is met."""

    def __post_init__(self) -> None:
        check_most(
            self,
            "encode.",
            batch_pixels=PIXELS,
            tile=2**16,
            workers=1024,
            decode_pixels=PIXELS,
            shard_mib=2**20,
            flush_seconds=MANY,
        )
        if self.batch_pixels is not None and self.batch_pixels < 1:
            raise ValueError(f"encode.batch_pixels is {self.batch_pixels}; it must be 1 or more, or null")
        if self.tile < 0 or self.tile % 32 or self.tile == 32:  # a quarter of it, in latents, is what overlaps
            raise ValueError(
                f"encode.tile is {self.tile}; give a multiple of 32 from 64, such as 2048, or 0 for no tiles"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"encode.workers is {self.workers}; it must be 1 or more, or null")
        for name in ("decode_pixels", "shard_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"encode.{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.flush_seconds >= 0:
            raise ValueError(f"encode.flush_seconds is {self.flush_seconds}; it must be 0 or more")

    @property
    def threads(self) -> int:
        """Threads that read and decode."""
        return self.workers or own_cores()

    def tiled(self, height: int, width: int) -> bool:
        """Whether a picture of this size is encoded in tiles."""
        return 0 < self.tile < max(height, width)

    def batch(self, height: int, width: int, device: torch.device) -> int:
        """How many pictures of this size are encoded at once."""
        most = self.batch_pixels if self.batch_pixels is not None else 2**20 if device.type == "cuda" else 1
        return max(1, most // (height * width))
