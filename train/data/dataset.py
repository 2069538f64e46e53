"""The training set's settings: what it is made of, and how its pictures and captions are used."""

from dataclasses import dataclass, field, fields
from typing import Any

from PIL import ImageColor

from infer.program.bounds import SEED, TOKENS, check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand, expanded
from infer.sample.edit import check_resolution
from infer.sample.picture import MOST_PIXELS
from train.data.source import BY_CONTENT, POLICIES, Source, check_references


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
    """What they count in the loss."""
    ratio: float = 1.0
    """Class pictures seen for each training picture."""
    steps: int | None = None
    """Denoising steps of each drawn picture; null takes the checkpoint's own."""
    guidance: float | None = None
    """How closely they follow the prompt; null takes the checkpoint's own."""
    seed: int = 0
    """Seed of the drawing: picture i has seed + i. Drawn at the first resolution, square."""

    def __post_init__(self) -> None:
        check_most(
            self, "data.prior.", count=10**6, weight=10**6, ratio=10**6, steps=10**4, guidance=10**4, seed=SEED // 2
        )
        expand(self, "path")
        if self.count < 0:
            raise ValueError(f"data.prior.count is {self.count}; it must be 0 (draw none) or more")
        if self.path and self.count:
            raise ValueError("data.prior has both a path and a count to draw; give one of them")
        if self.count and not self.prompt.strip():
            raise ValueError("data.prior.prompt is empty; say what the base draws, as in 'a photo of a dog'")
        changed = [f"data.prior.{each.name}" for each in fields(self) if getattr(self, each.name) != each.default]
        if changed and not (self.path or self.count):
            raise ValueError(
                f"{changed[0]} is set, but there are no pictures; give data.prior.path, or data.prior.count"
            )
        for name in ("weight", "ratio"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"data.prior.{name} is {getattr(self, name)}; it must be above 0")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"data.prior.steps is {self.steps}; it must be 1 or more")
        if self.path:
            reason = "the base draws no pictures where data.prior.path gives them"
            refuse_idle(self, "data.prior.", ("steps", "guidance", "seed"), reason)


@dataclass
class Data:
    """The training set."""

    path: str = ""
    """A folder of pictures, a .parquet or .arrow file, the name of a data set on the Hub, or the address of a folder or
    file in the cloud (s3://, gs://, hf://); or data.sources."""
    resolution: Any = 512
    """Pixels a side of the square that a picture has as many pixels as; a list trains at each in turn."""
    batch_size: int = 1
    """Samples a step on each rank."""
    trigger: str | None = None
    """Put before every caption that does not hold it."""
    validation: float = 0.1
    """Share of the pictures held out, at least one; 0 holds out none."""
    image_column: str = field(default="image", metadata=BY_CONTENT)
    """The column of the pictures in a table or a data set on the Hub."""
    caption_column: str = field(default="text", metadata=BY_CONTENT)
    """The column of the captions in metadata.jsonl, metadata.csv, a table or a data set; a list is several captions."""
    masks: str | None = None
    """The masks of data.path: a folder of greyscale pictures of the same names, white where the loss counts."""
    references: list[str] = field(default_factory=list)
    """The reference pictures of data.path (edit training): folders of pictures of the same names, such as [before], in
    their order; of a table, its columns of them. A folder's metadata.jsonl may name them instead."""
    reference_resolution: int | None = None
    """Pixels a side of the square that a reference has as many pixels as, in a bucket of its own. Null: one as large as
    its picture is cut like it, so that both stay aligned; others take the picture's resolution."""
    reference_dropout: float = 0.0
    """Share of the samples that are trained without their references."""
    teach_references: bool = False
    """Train with references on a checkpoint that was not trained with any, which is refused otherwise: the adapter has
    to learn what they are for."""
    sources: list[Source] = field(default_factory=list)
    """Several sources in place of data.path, each with its masks, references, repeats and weight."""
    prior: Prior = field(default_factory=Prior)
    background: str = "white"
    """What shows through transparent pictures: a name or #rrggbb."""
    most_pixels: int = field(default=MOST_PIXELS, metadata=BY_CONTENT)
    """Pictures with more are refused before they are decoded; decoding takes 8 to 21 bytes a pixel."""
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
    """Put before every caption as it is, spaces included."""
    suffix: str = ""
    """Put behind every caption as it is, spaces included."""
    caption_lines: bool = field(default=False, metadata=BY_CONTENT)
    """Each line of a .txt or .caption file is a caption of its own."""
    tag_orders: int = 1
    """Orders in which a caption's comma-separated tags are trained; 1 leaves them as written."""
    keep_tags: int = 0
    """The first tags, which stay in front."""
    caption_dropout: float = 0.0
    """Share of the samples that are trained with an empty caption."""
    text_length: int | None = None
    """text tokens; null takes the checkpoint's own (512 for FLUX.1-dev)."""
    on_error: str = field(default="raise", metadata={"may_change": True})
    """What a broken picture or a missing caption does: raise stops, skip leaves it out and names it."""
    least: float = field(default=0.5, metadata={"may_change": True})
    """Share of the samples that must be left after skipping; training does not start with less."""
    cache: str = field(default="runs/cache", metadata={"may_change": True})
    """Where encoded pictures and captions are kept, for every run."""

    def __post_init__(self) -> None:
        check_most(
            self,
            "data.",
            batch_size=4096,
            aspect=10**4,
            crops=1000,
            tag_orders=10**4,
            keep_tags=10**4,
            text_length=TOKENS,
        )
        expand(self, "path", "masks", "cache")
        self.references = [expanded(path) for path in self.references]
        check_references("data.references", self.references)
        if self.references and not self.path:
            raise ValueError("data.references belongs to data.path; give each of data.sources its own references")
        check_resolution("data.reference_resolution", self.reference_resolution)
        listed = isinstance(self.resolution, list | tuple)
        if not self.resolutions or not all(type(r) is int for r in self.resolutions):
            raise ValueError(f"data.resolution is {self.resolution!r}; give a number, or several as [512,768]")
        for r in self.resolutions:
            if r < 16 or r % 16:
                near = max(16, round(r / 16) * 16)
                raise ValueError(f"data.resolution is {self.resolution}; FLUX packs multiples of 16, such as {near}")
            if r * r > MOST_PIXELS:
                raise ValueError(f"data.resolution is {self.resolution}; a picture has {MOST_PIXELS} pixels at most")
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
        for name in ("validation", "caption_dropout", "reference_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it is a share, at least 0 and below 1")
        if not 0 <= self.least <= 1:
            raise ValueError(f"data.least is {self.least}; it is a share, from 0 to 1")
        if self.on_error == "raise":
            refuse_idle(self, "data.", ("least",), "data.on_error=raise skips nothing")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"data.text_length is {self.text_length}; it must be 1 or more, or null")
        if not 1 <= self.aspect < float("inf"):
            raise ValueError(f"data.aspect is {self.aspect}; it must be 1 (squares) or more")
        if self.reference_resolution is not None and self.reference_resolution < self.bucket_step:
            raise ValueError(
                f"data.reference_resolution is {self.reference_resolution}, less than data.bucket_step="
                f"{self.bucket_step}; raise it, or lower the step"
            )
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


def sources_of(data: Data) -> list[Source]:
    """What a sample's `source` counts: data.path as one, or data.sources; and last prior preservation's, if any."""
    sources = list(data.sources) if data.sources or not data.path else [Source(data.path, data.masks, data.references)]
    prior = data.prior
    if prior.path or prior.count:
        path = prior.path or f"{prior.count} pictures drawn by the base"
        sources.append(Source(path, weight=prior.weight, caption=prior.prompt or None, prior=True))
    return sources
